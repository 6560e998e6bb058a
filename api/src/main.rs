//! The `holdfast` program.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use holdfast_api::back_end;
use holdfast_api::cli::{self, CliError, Ctl, Invocation, RunOptions};
use holdfast_api::process::{self, Confinement, describe};
use holdfast_api::{client, progress};
use holdfast_config::RestoreConfig;
use holdfast_objects::Objects;
use holdfast_sandbox::{Sandbox, SandboxError};
use holdfast_threads::Role;
use holdfast_vmm::confine;
use holdfast_vmm::manager::{Manager, ManagerOptions};

/// Exit status for a command line that cannot be used, as is customary.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os()) {
        Ok(Invocation::Run(options)) => run(*options),
        Ok(Invocation::BackEnd(options)) => match back_end::run(&options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&describe(&error), 1),
        },
        Ok(Invocation::Ctl(ctl)) => control(&ctl),
        Ok(Invocation::Img(args, name)) => ExitCode::from(holdfast_img::main(args, name)),
        Ok(Invocation::Print(text)) => print(&text),
        Ok(Invocation::Man(directory)) => man(&directory),
        Ok(Invocation::Completions(shell)) => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut cli::command(true), "holdfast", &mut text);
            print(&String::from_utf8_lossy(&text))
        }
        // Prints help and version to standard output, the rest to standard error.
        Err(CliError::Usage(usage)) => usage.exit(),
        Err(error) => fail(&describe(&error), USAGE),
    }
}

fn fail(reason: &str, status: u8) -> ExitCode {
    eprintln!("holdfast: {reason}");
    ExitCode::from(status)
}

fn print(text: &str) -> ExitCode {
    // A reader that has seen enough, such as `head`, is no error.
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
    ExitCode::SUCCESS
}

fn control(ctl: &Ctl) -> ExitCode {
    let answer = if ctl.progress { progress::send(ctl) } else { client::send(ctl) };
    match answer {
        Ok(body) if body.is_empty() => ExitCode::SUCCESS,
        Ok(body) => print(&body),
        Err(error) => fail(&describe(&error), 1),
    }
}

fn man(directory: &Path) -> ExitCode {
    match clap_mangen::generate_to(cli::command(true), directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("man pages cannot be written to {}: {error}", directory.display()), 1),
    }
}

/// This process's sandbox.
struct Confined(Arc<Sandbox>);

impl Confinement for Confined {
    fn paths(&self, options: &RunOptions, sockets: &[PathBuf]) -> Result<(), SandboxError> {
        self.0.keep_sockets_removable(sockets);
        let Some(more) = &options.landlock else { return Ok(()) };
        let restore_from = options.restore.as_ref().and_then(RestoreConfig::directory);
        confine::limit_process(&self.0, options.config.as_deref(), restore_from.as_deref(), more, sockets)
    }

    fn main_thread(&self) -> Result<(), SandboxError> {
        self.0.confine(Role::Api)
    }
}

fn run(options: RunOptions) -> ExitCode {
    let sandbox = match Sandbox::new(options.seccomp) {
        Ok(sandbox) => sandbox,
        Err(error) => return fail(&describe(&error), 1),
    };
    // Before the sandbox closes: secrets and certificates may be in files.
    let objects = Arc::new(Objects::for_vm());
    for text in &options.objects.0 {
        if let Err(error) = objects.add_text(text) {
            return fail(&format!("--object: {error}"), 1);
        }
    }
    let spawner = sandbox.spawner();
    let manager = ManagerOptions {
        sandbox: Arc::clone(&sandbox),
        no_shutdown: options.no_shutdown,
        debug: options.gdb.is_some(),
        debug_wait: options.gdb_wait,
        objects,
    };
    let confinement = Confined(sandbox);
    match process::run(options, &spawner, &confinement, move |inbox| Manager::new(inbox, manager)?.run()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => fail(&describe(&error), 1),
    }
}
