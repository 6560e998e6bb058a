//! What Debian's drivers are given by the host, and what the host finds afterwards: disks, a server on a tap.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::printed;

/// Runs `command` and returns what it printed.
///
/// # Panics
/// If it cannot be run or fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The SHA-256 of a file, in hexadecimal.
///
/// # Panics
/// If it cannot be read.
pub fn sha256(path: &Path) -> String {
    run(Command::new("sha256sum").arg(path))[..64].to_owned()
}

/// An ext4 image of 64 MiB with a file of `words` pseudo-random words and its checksum.
///
/// # Panics
/// If it cannot be made: e2fsprogs are needed.
pub fn ext4_image(dir: &Path, words: u32) -> PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir(&tree).expect("directory");
    let content: Vec<u8> =
        (0..words).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()).collect();
    std::fs::write(tree.join("content"), content).expect("file");
    let sums = run(Command::new("sha256sum").arg("content").current_dir(&tree));
    std::fs::write(tree.join("SUMS"), sums.replace("content", "/mnt/content")).expect("file");
    let image = dir.join("disk.img");
    run(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&image).arg("64M"));
    image
}

/// Checks the guest's test `disk`: it read what the host wrote to `image`, whose serial number was `holdfast-1`, and
/// what it wrote is what the host finds, in a file system without errors.
///
/// # Panics
/// If not.
pub fn check_disk(output: &str, image: &Path) {
    assert!(output.contains("/mnt/content: OK"), "{output}");
    // The kernel gives the serial number without a newline.
    assert!(printed(output, "SERIAL").starts_with("holdfast-1"), "{output}");
    let in_guest = printed(output, "DATA-SHA256");
    assert_eq!(printed(output, "COPY-SHA256")[..64], in_guest[..64]);
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(image));
    let data = image.with_extension("data");
    run(Command::new("debugfs").arg("-R").arg(format!("dump /data {}", data.display())).arg(image));
    assert_eq!(sha256(&data), in_guest[..64]);
}

/// A tap's side of the guest's test `net`: the file that the guest is going to fetch.
#[derive(Debug)]
pub struct NetPeer {
    content: Vec<u8>,
    sum: String,
}

impl NetPeer {
    /// A file of `len` pseudo-random bytes.
    ///
    /// # Panics
    /// If `dir` cannot be written.
    pub fn new(dir: &Path, len: u32) -> Self {
        let content: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(2_246_822_519) >> 13) as u8).collect();
        let file = dir.join("served");
        std::fs::write(&file, &content).expect("file");
        Self { sum: sha256(&file), content }
    }

    /// The value of `--net` for a tap called `tap`.
    pub fn option(tap: &str) -> String {
        format!("tap={tap},ip=192.168.77.1,mask=255.255.255.0,mac=52:54:00:12:34:56,mtu=1400")
    }

    /// Serves the file once, from now on: the tap has to be there. The address is the tap's, so nothing else on the
    /// host can have the port.
    ///
    /// # Panics
    /// If the tap is not there.
    pub fn serve(&self) -> std::thread::JoinHandle<()> {
        let listener = TcpListener::bind("192.168.77.1:8377").expect("the tap has its address");
        serve_once(listener, self.content.clone())
    }

    /// Checks what the guest printed.
    ///
    /// # Panics
    /// If it is not what was served.
    pub fn check(&self, output: &str) {
        assert!(output.contains("3 packets received") || output.contains("0% packet loss"), "{output}");
        assert_eq!(printed(output, "FILE-SHA256")[..64], self.sum);
        assert_eq!(printed(output, "MAC"), "52:54:00:12:34:56");
        assert_eq!(printed(output, "MTU"), "1400");
    }
}

/// Serves one GET with `content`.
fn serve_once(listener: TcpListener, content: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut request = [0; 1024];
        let n = stream.read(&mut request).expect("a request");
        assert!(request[..n].starts_with(b"GET /file "));
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content)).expect("the guest reads");
    })
}

/// Checks the guest's test `rng`.
///
/// # Panics
/// If the kernel does not use our device, or read less than 64 bytes.
pub fn check_rng(output: &str) {
    assert!(printed(output, "RNG").starts_with("virtio_rng"), "{output}");
    assert!(output.lines().any(|l| l.trim() == "64"), "{output}");
}
