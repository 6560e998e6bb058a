//! `holdfast` with a VM manager that has no VM: the other end for tests of API clients.

#[path = "../tests/common/mod.rs"]
mod common;

use std::process::ExitCode;

use holdfast_api::cli::{self, Invocation};
use holdfast_api::process::{Unconfined, describe, run};
use holdfast_threads::PlainSpawner;

fn main() -> ExitCode {
    let Ok(Invocation::Run(options)) = cli::parse(std::env::args_os()) else {
        eprintln!("usage: fake run OPTIONS");
        return ExitCode::FAILURE;
    };
    match run(*options, &PlainSpawner::shared(), &Unconfined, |inbox| {
        common::FakeManager::default().serve(&inbox)
    }) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("fake: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}
