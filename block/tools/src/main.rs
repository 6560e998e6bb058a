//! The image tools by themselves, without the VMM. A name that ends with `nbd` or `io` is another tool's.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let named =
        args.first().map(Path::new).and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
    let name = match named {
        Some(name) if name.ends_with("nbd") => "holdfast-nbd",
        Some(name) if name.ends_with("-io") => "holdfast-io",
        _ => "holdfast-img",
    };
    ExitCode::from(holdfast_img::main(args, name))
}
