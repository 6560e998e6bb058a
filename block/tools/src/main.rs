//! The image tool by itself, without the VMM.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(holdfast_img::main(std::env::args_os(), "holdfast-img"))
}
