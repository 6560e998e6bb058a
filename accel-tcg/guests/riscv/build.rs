//! Makes the instruction decoder from `isa/*.dec`.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let mut generator = holdfast_decode_gen::Generator::new();
    for table in ["isa/rv64.dec", "isa/rv64c.dec"] {
        println!("cargo::rerun-if-changed={table}");
        generator.table(table, &fs::read_to_string(table)?)?;
    }
    let out = env::var("OUT_DIR")?;
    fs::write(Path::new(&out).join("decode.rs"), generator.generate())?;
    Ok(())
}
