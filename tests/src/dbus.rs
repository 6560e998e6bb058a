//! D-Bus buses of Debian's `dbus-daemon`, and helpers on them whose state moves along with a VM.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A process that ends with its owner.
#[derive(Debug)]
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Owned {
    /// Starts a process; returns when it has written a line.
    fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut this = Self(child.unwrap_or_else(|e| panic!("{command:?}: {e}")));
        let mut line = String::new();
        let output = this.0.stdout.take().expect("a pipe");
        let mut output = BufReader::new(output);
        output.read_line(&mut line).expect("readable");
        assert!(line.ends_with('\n'), "{command:?} says {line:?} and ends");
        // Whatever it says later goes nowhere.
        std::thread::spawn(move || output.read_to_end(&mut Vec::new()));
        this
    }
}

fn address(dir: &Path) -> String {
    format!("unix:path={}", dir.join("socket").display())
}

/// A bus with helpers.
#[derive(Debug)]
pub struct Bus {
    dir: PathBuf,
    helpers: Vec<Owned>,
    _daemon: Owned,
}

impl Bus {
    /// Starts a bus whose files are in `dir/name`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(dir: &Path, name: &str) -> Self {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).expect("directory");
        let config = format!(
            "<busconfig><type>session</type><listen>{}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
             <allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/><allow own=\"*\"/></policy></busconfig>",
            address(&dir),
        );
        let file = dir.join("config");
        std::fs::write(&file, config).expect("written");
        let mut daemon = Command::new("dbus-daemon");
        // It complains that it may not have as many descriptors as it would like.
        daemon.args(["--nofork", "--print-address"]).arg("--config-file").arg(file).stderr(Stdio::null());
        Self { _daemon: Owned::start(&mut daemon), helpers: Vec::new(), dir }
    }

    /// Its address.
    pub fn address(&self) -> String {
        address(&self.dir)
    }

    /// Starts a helper called `id` with this state; `how` is what `clients/vmstate_helper.py` says.
    ///
    /// # Panics
    /// If it does not start.
    pub fn helper(&mut self, id: &str, state: &[u8], how: &str) {
        let file = self.dir.join(format!("{id}-{}", self.helpers.len()));
        std::fs::write(&file, state).expect("written");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/vmstate_helper.py");
        let mut helper = Command::new("/usr/bin/python3");
        helper.arg(script).arg(self.address()).arg(id).arg(file).arg(how);
        self.helpers.push(Owned::start(&mut helper));
    }

    /// The state of the helper `id`, which was the one with the number `n`, from 0, that was started here.
    ///
    /// # Panics
    /// If there is none.
    pub fn state(&self, id: &str, n: usize) -> Vec<u8> {
        std::fs::read(self.dir.join(format!("{id}-{n}"))).expect("a helper")
    }
}
