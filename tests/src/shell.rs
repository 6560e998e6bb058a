//! A guest's shell.

use std::time::Duration;

use crate::Program;

/// How long anything may take: the test machine may be busy. Nothing is asserted about speed.
pub const BOOT: Duration = Duration::from_secs(240);

/// A guest with a shell that is given one command at a time.
#[derive(Debug)]
pub struct Guest {
    /// The program that runs it.
    pub vm: Program,
    at: usize,
    count: u32,
}

impl Guest {
    /// Boots with these arguments, to the shell.
    ///
    /// # Panics
    /// If it does not.
    pub fn boot(args: &[String]) -> Self {
        Self::of(Program::run(args))
    }

    /// The guest that `vm` boots, at the shell.
    ///
    /// # Panics
    /// If it does not get there.
    pub fn of(vm: Program) -> Self {
        vm.wait_for("BOOTED", BOOT);
        let at = vm.wait_for("# ", BOOT);
        Self { vm, at, count: 0 }
    }

    /// The same guest, which goes on in another process.
    #[must_use]
    pub fn moved(self, vm: Program) -> Self {
        Self { vm, at: 0, count: self.count }
    }

    /// Types a command and returns what it prints, once it is done.
    ///
    /// # Panics
    /// If it does not end.
    pub fn run(&mut self, command: &str) -> String {
        self.start(command);
        self.finish()
    }

    /// Types a command and lets it run.
    ///
    /// # Panics
    /// If nobody reads.
    pub fn start(&mut self, command: &str) {
        self.count += 1;
        // What is typed is echoed: only the shell makes one word of the two.
        self.vm.type_in(&format!("{command}; echo END''-{}-\n", self.count));
    }

    /// Waits for the command that runs; returns what it has printed.
    ///
    /// # Panics
    /// If it does not end.
    pub fn finish(&mut self) -> String {
        let from = self.at;
        let end = format!("END-{}-", self.count);
        self.at = self.vm.wait_for_after(&end, from, BOOT);
        let output = self.vm.output();
        output[from..self.at].replace('\r', "").rsplit_once(&end).expect("it is there").0.to_owned()
    }

    /// Waits until a file of sysfs says `value`, or is gone (`None`).
    ///
    /// # Panics
    /// If that does not come.
    pub fn wait_for(&mut self, file: &str, value: Option<&str>) {
        let test = match value {
            Some(value) => format!("[ \"$(cat {file} 2>/dev/null)\" = {value} ]"),
            None => format!("[ ! -e {file} ]"),
        };
        self.run(&format!("until {test}; do sleep 0.2; done"));
    }

    /// Switches it off and waits for the program's end.
    ///
    /// # Panics
    /// If it does not end, or not well.
    pub fn power_off(mut self) {
        self.vm.type_in("poweroff -f\n");
        assert!(self.vm.wait_exit(BOOT).success(), "{}", self.vm.output());
    }
}
