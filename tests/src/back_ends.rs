//! Processes that serve devices over vhost-user.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::holdfast;

/// A running virtiofsd.
#[derive(Debug)]
pub struct Virtiofsd(Child);

impl Virtiofsd {
    /// Shares `dir` on `socket`, in the place of one that was killed too.
    ///
    /// # Panics
    /// If it does not start.
    pub fn share(dir: &Path, socket: &Path) -> Self {
        let named = std::env::var_os("HOLDFAST_VIRTIOFSD").map(PathBuf::from);
        let known = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"].map(PathBuf::from);
        let program = named.into_iter().chain(known).find(|path| path.exists());
        let program = program.expect("virtiofsd is needed: qemu-system-common or virtiofsd");
        Self::of(&program, dir, socket)
    }

    /// As [`Virtiofsd::share`], with this program.
    ///
    /// # Panics
    /// If it does not start.
    pub fn of(program: &Path, dir: &Path, socket: &Path) -> Self {
        // The one written in C has options of its own.
        let old = program.starts_with("/usr/lib/qemu");
        // A killed one leaves it behind.
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", socket.display()));
        if old {
            command.args(["-o", &format!("source={}", dir.display()), "-o", "cache=auto"]);
        } else {
            command.arg(format!("--shared-dir={}", dir.display()));
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("virtiofsd starts");
        let this = Self(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "virtiofsd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        this
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running back end.
#[derive(Debug)]
pub struct BackEnd(Child);

impl BackEnd {
    /// Starts `command`, which listens on `socket`.
    ///
    /// # Panics
    /// If nobody listens there.
    pub fn start(command: &mut Command, socket: &Path) -> Self {
        let this = Self::spawn(command);
        let deadline = Instant::now() + Duration::from_secs(60);
        // What a killed one left behind refuses connections.
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < deadline, "nobody listens on {}", socket.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        this
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// A tap of ours.
    pub fn net(keys: &str, socket: &Path) -> Self {
        Self::start(Command::new(holdfast()).args(["net-backend", keys]), socket)
    }

    /// A tap of ours that connects to its front end (`client=on`), whenever that listens.
    ///
    /// # Panics
    /// If it does not start.
    pub fn connecting(keys: &str) -> Self {
        Self::spawn(Command::new(holdfast()).args(["net-backend", keys]))
    }

    /// One that connects to its front end, whenever that listens.
    ///
    /// # Panics
    /// If it does not start.
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the back end starts"))
    }

    /// Our own disk.
    pub fn disk(image: &Path, socket: &Path) -> Self {
        let keys = format!("socket={},path={},serial=holdfast-1", socket.display(), image.display());
        let mut command = Command::new(holdfast());
        let options = ["blk-backend", &format!("{keys},image_type=raw,num_queues=2"), "--landlock"];
        Self::start(command.args(options), socket)
    }

    /// QEMU's storage daemon.
    pub fn daemon(image: &Path, socket: &Path) -> Self {
        let mut command = Command::new("qemu-storage-daemon");
        let file = format!("driver=file,node-name=file,filename={}", image.display());
        command.args(["--blockdev", &file, "--blockdev", "driver=raw,node-name=disk,file=file"]);
        let at = format!("addr.type=unix,addr.path={}", socket.display());
        let export = format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,{at}");
        command.args(["--export", &export]);
        Self::start(&mut command, socket)
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets other processes map the guest's RAM.
///
/// # Panics
/// If `args` are not those of a guest.
pub fn shared_ram(args: &mut [String]) {
    let memory = args.iter_mut().find(|arg| *arg == "size=512M").expect("the size of RAM");
    *memory = "size=512M,shared=on".to_owned();
}
