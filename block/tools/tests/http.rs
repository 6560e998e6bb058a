//! Images of web servers (Debian: busybox, qemu-utils, gnutls-bin): ranges, passwords, TLS, proxies, and servers that lie.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use holdfast_objects::Objects;
use holdfast_objects::tls::{ServerConfig, ServerConnection, StreamOwned};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Answers a request's head with whole words of a server.
type Handler = Box<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// Reads up to the empty line that ends a request's head.
fn head(stream: &mut impl Read) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
        head.push(byte[0]);
    }
    text(&head)
}

/// A server at a port that the host has chosen; each connection is one request. It goes with the process.
struct Web {
    port: u16,
    /// Requests that were for contents.
    gets: Arc<AtomicUsize>,
}

impl Web {
    fn start(tls: Option<Arc<ServerConfig>>, handler: Handler) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("address").port();
        let gets = Arc::new(AtomicUsize::new(0));
        let (count, handler) = (Arc::clone(&gets), Arc::new(handler));
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (tls, handler, count) = (tls.clone(), Arc::clone(&handler), Arc::clone(&count));
                std::thread::spawn(move || match tls {
                    None => serve(socket, &count, &handler),
                    Some(config) => {
                        let connection = ServerConnection::new(config).expect("TLS");
                        let mut stream = StreamOwned::new(connection, socket);
                        serve(&mut stream, &count, &handler);
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    }
                });
            }
        });
        Self { port, gets }
    }

    /// Files of a directory, by busybox.
    fn files(dir: &Path, config: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        let (dir, rules) = (dir.to_owned(), dir.join("httpd.conf"));
        std::fs::write(&rules, config).expect("rules");
        let answer = move |head: &str| {
            let mut server = Command::new("busybox")
                .args(["httpd", "-i", "-h"])
                .arg(&dir)
                .arg("-c")
                .arg(&rules)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("busybox");
            let _ = server.stdin.take().expect("stdin").write_all(head.as_bytes());
            server.wait_with_output().expect("answer").stdout
        };
        Self::start(tls, Box::new(answer))
    }

    /// Options of an image, with all the time that a busy host may need.
    fn image(&self, driver: &str, name: &str) -> String {
        format!("driver={driver},file.driver=http,file.timeout=600,file.url={}", self.url(name))
    }

    fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }
}

fn serve(mut stream: impl Read + Write, count: &AtomicUsize, handler: &Handler) {
    let head = head(&mut stream);
    if head.starts_with("GET ") {
        count.fetch_add(1, Ordering::SeqCst);
    }
    if !head.is_empty() {
        // Clients that have heard enough go.
        let _ = stream.write_all(&handler(&head));
        let _ = stream.flush();
    }
}

struct Bed(tempfile::TempDir);

impl Bed {
    /// A directory with a raw image and a qcow2 image of it.
    fn new() -> Self {
        let bed = Self(tempfile::tempdir().expect("directory"));
        let data: Vec<u8> =
            (0..3_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        std::fs::write(bed.dir().join("in.raw"), &data[..2_999_808]).expect("data");
        bed.ok("theirs", &["convert", "-c", "-f", "raw", "-O", "qcow2", "in.raw", "x.qcow2"]);
        bed
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = match program {
            "ours" => Command::new(env!("CARGO_BIN_EXE_holdfast-img")),
            "our-io" => {
                let link = self.dir().join("ours-io");
                let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_holdfast-img"), &link);
                Command::new(link)
            }
            _ => Command::new(std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into())),
        };
        for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file"] {
            command.env_remove(name).env_remove(name.to_uppercase());
        }
        command.current_dir(self.dir());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        self.command(program).args(args).output().expect("qemu-img (Debian: qemu-utils)")
    }

    fn ok(&self, program: &str, args: &[&str]) -> String {
        let out = self.run(program, args);
        assert!(out.status.success(), "{program} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }

    fn refused(&self, args: &[&str]) -> String {
        let out = self.run("ours", args);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {}", text(&out.stdout));
        text(&out.stderr)
    }
}

#[test]
fn images_are_read_in_ranges_and_ahead() {
    let bed = Bed::new();
    let web = Web::files(bed.dir(), "", None);
    let image = web.image("raw", "in.raw");
    bed.ok("ours", &["compare", "--image-opts", "driver=raw,file.filename=in.raw", &image]);
    bed.ok("ours", &["convert", "--image-opts", &web.image("qcow2", "x.qcow2"), "-O", "raw", "out.raw"]);
    bed.ok("theirs", &["compare", "-f", "raw", "-F", "raw", "in.raw", "out.raw"]);
    // A local image may build on it.
    assert!(bed.ok("ours", &["info", &web.url("x.qcow2")]).contains("file format: qcow2"));
    let url = web.url("x.qcow2");
    let below =
        format!(r#"json:{{"driver":"qcow2","file":{{"driver":"http","timeout":600,"url":"{url}"}}}}"#);
    bed.ok("ours", &["create", "-f", "qcow2", "-b", &below, "-F", "qcow2", "top.qcow2"]);
    bed.ok("our-io", &["-f", "qcow2", "-c", "write -P 7 4k 4k", "-c", "read -P 7 4k 4k", "top.qcow2"]);
    // Sixteen reads, one range.
    let before = web.gets.load(Ordering::SeqCst);
    let reads: Vec<String> = (0..16).map(|n| format!("read {}k 4k", 1000 + n * 4)).collect();
    let mut args = vec!["-r", "--image-opts"];
    reads.iter().for_each(|r| args.extend(["-c", r.as_str()]));
    args.push(&image);
    bed.ok("our-io", &args);
    assert_eq!(web.gets.load(Ordering::SeqCst) - before, 1);
    // It is not written.
    let said = bed.refused(&["resize", "-f", "raw", &web.url("in.raw"), "+1M"]);
    assert!(said.contains("does not support writes"), "{said}");
    let image = format!("driver=raw,file.driver=https,file.url={}", web.url("in.raw"));
    let said = bed.refused(&["info", "--image-opts", &image]);
    assert!(said.contains("does not start with 'https://'"), "{said}");
    let image = format!("driver=raw,file.driver=http,file.readahead=1000,file.url={}", web.url("in.raw"));
    let said = bed.refused(&["info", "--image-opts", &image]);
    assert!(said.contains("is not a multiple of 512"), "{said}");
}

#[test]
fn passwords_and_cookies_come_from_secrets() {
    let bed = Bed::new();
    let web = Web::files(bed.dir(), "/:me:opensesame\n", None);
    let said = bed.refused(&["info", &web.url("x.qcow2")]);
    assert!(said.contains("The requested URL returned error: 401"), "{said}");
    let image = format!(
        "driver=qcow2,file.driver=http,file.timeout=600,file.username=me,file.password-secret=s,file.url={}",
        web.url("x.qcow2")
    );
    let convert = |secret: &str| {
        ["convert", "--object", secret, "--image-opts", &image, "-O", "raw", "out.raw"].map(str::to_owned)
    };
    let run = |secret: &str| {
        let args = convert(secret);
        bed.run("ours", &args.each_ref().map(String::as_str))
    };
    let out = run("secret,id=s,data=wrongsesame");
    assert!(text(&out.stderr).contains("error: 401"), "{}", text(&out.stderr));
    assert!(!text(&out.stderr).contains("wrongsesame"));
    assert!(run("secret,id=s,data=opensesame").status.success());
    bed.ok("theirs", &["compare", "-f", "raw", "-F", "raw", "in.raw", "out.raw"]);

    let seen = Arc::new(Mutex::new(String::new()));
    let heard = Arc::clone(&seen);
    let answer = move |head: &str| {
        heard.lock().expect("heard").push_str(head);
        b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
    };
    let web = Web::start(None, Box::new(answer));
    let image = format!("driver=raw,file.driver=http,file.cookie-secret=s,file.url={}", web.url("x"));
    let said = bed.refused(&["info", "--object", "secret,id=s,data=a=b; c=d", "--image-opts", &image]);
    assert!(said.contains("error: 403"), "{said}");
    assert!(seen.lock().expect("heard").to_lowercase().contains("\r\ncookie: a=b; c=d\r\n"));
}

#[test]
fn servers_that_do_not_do_ranges_or_lie_are_refused() {
    let bed = Bed::new();
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
    let ranges = "Accept-Ranges: bytes\r\nContent-Length: 1024\r\n\r\n";
    let partial = "HTTP/1.1 206 Partial Content\r\nConnection: close\r\n";
    // What HEAD gets, what GET gets, what is said.
    let cases: [(String, String, &str); 7] = [
        (format!("{head}Content-Length: 1024\r\n\r\n"), String::new(), "Server does not support 'range'"),
        (format!("{head}Accept-Ranges: bytes\r\n\r\n"), String::new(), "Server didn't report file size."),
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".into(), String::new(), "error: 404"),
        ("garbage\r\n\r\n".into(), String::new(), "CURL: Error opening file"),
        (
            format!("{head}{ranges}"),
            format!("{head}Content-Length: 1024\r\n\r\n"),
            "the file on the server has changed",
        ),
        (
            format!("{head}{ranges}"),
            format!("{partial}Content-Range: bytes 5-9/1024\r\nContent-Length: 5\r\n\r\nabcde"),
            "gives another range",
        ),
        (
            format!("{head}{ranges}"),
            format!("{partial}Content-Range: bytes 0-1023/1024\r\nContent-Length: 1024\r\n\r\nshort"),
            "error while reading",
        ),
    ];
    for (first, then, expected) in cases {
        let answer =
            move |head: &str| if head.starts_with("HEAD") { &first } else { &then }.clone().into_bytes();
        let web = Web::start(None, Box::new(answer));
        let said = bed.refused(&["convert", "-f", "raw", "-O", "raw", &web.url("x"), "no.raw"]);
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

/// An authority and a server's certificate for 127.0.0.1, with keys on elliptic curves.
fn certificates(dir: &Path) {
    let make = |args: &[&str]| {
        let out = Command::new("certtool").current_dir(dir).args(args).output();
        let out = out.expect("certtool (Debian: gnutls-bin)");
        assert!(out.status.success(), "{}", text(&out.stderr));
    };
    std::fs::write(dir.join("ca.info"), "cn = Test\nca\ncert_signing_key\n").expect("template");
    let server = "cn = web\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\n";
    std::fs::write(dir.join("server.info"), server).expect("template");
    for who in ["ca-key.pem", "server-key.pem"] {
        make(&["--generate-privkey", "--key-type", "ecdsa", "--curve", "secp256r1", "--outfile", who]);
    }
    let own = ["--generate-self-signed", "--template", "ca.info", "--load-privkey", "ca-key.pem"];
    make(&[&own[..], &["--outfile", "ca-cert.pem"]].concat());
    let issue =
        ["--generate-certificate", "--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem"];
    let what =
        ["--load-privkey", "server-key.pem", "--template", "server.info", "--outfile", "server-cert.pem"];
    make(&[&issue[..], &what[..]].concat());
}

#[test]
fn servers_are_verified_unless_that_is_switched_off() {
    let bed = Bed::new();
    let dir = bed.dir().join("pki");
    std::fs::create_dir(&dir).expect("directory");
    certificates(&dir);
    let objects = Objects::default();
    objects
        .add_text(&format!("tls-creds-x509,id=t,dir={},endpoint=server,verify-peer=off", dir.display()))
        .expect("credentials");
    let config = objects.tls("t").and_then(|t| t.server()).expect("a server's");
    let web = Web::files(bed.dir(), "", Some(config));
    let url = web.url("x.qcow2").replace("http://", "https://");
    let image = format!("driver=qcow2,file.driver=https,file.timeout=600,file.url={url}");
    let convert = ["convert", "--image-opts", &image, "-O", "raw", "out.raw"];
    let trusting = |file: &Path| {
        let mut command = bed.command("ours");
        command.env("SSL_CERT_FILE", file).args(convert).output().expect("ours")
    };
    let out = trusting(&dir.join("ca-cert.pem"));
    assert!(out.status.success(), "{}", text(&out.stderr));
    bed.ok("theirs", &["compare", "-f", "raw", "-F", "raw", "in.raw", "out.raw"]);
    // Somebody else's authority.
    let other = bed.dir().join("other");
    std::fs::create_dir(&other).expect("directory");
    certificates(&other);
    let out = trusting(&other.join("ca-cert.pem"));
    assert!(!out.status.success() && text(&out.stderr).contains("certificate"), "{}", text(&out.stderr));
    let image = format!("driver=qcow2,file.driver=https,file.timeout=600,file.sslverify=off,file.url={url}");
    bed.ok("ours", &["convert", "--image-opts", &image, "-O", "raw", "out.raw"]);
}

/// A proxy that lets in who has the right name and password, `me:open`.
fn proxy() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("address").port();
    let tunnels = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tunnels);
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let count = Arc::clone(&count);
            std::thread::spawn(move || {
                let head = head(&mut client);
                let place = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
                if !head.starts_with("CONNECT ") || !head.contains("Basic bWU6b3Blbg==") {
                    let _ = client.write_all(b"HTTP/1.1 407 Who?\r\nContent-Length: 0\r\n\r\n");
                    return;
                }
                count.fetch_add(1, Ordering::SeqCst);
                let server = TcpStream::connect(place).expect("server");
                client.write_all(b"HTTP/1.1 200 Go\r\n\r\n").expect("client");
                let (mut from, mut to) =
                    (client.try_clone().expect("client"), server.try_clone().expect("server"));
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
                let mut server = server;
                let _ = std::io::copy(&mut server, &mut client);
                let _ = client.shutdown(Shutdown::Both);
            });
        }
    });
    (port, tunnels)
}

#[test]
fn a_proxy_is_used_with_a_name_and_a_password() {
    let bed = Bed::new();
    let web = Web::files(bed.dir(), "", None);
    let (port, tunnels) = proxy();
    let image = format!(
        "driver=raw,file.driver=http,file.timeout=600,file.proxy-username=me,file.proxy-password-secret=s,file.url={}",
        web.url("in.raw")
    );
    let run = |secret: &str| {
        let mut command = bed.command("ours");
        command.env("http_proxy", format!("http://127.0.0.1:{port}"));
        command.args(["convert", "--object", secret, "--image-opts", &image, "-O", "raw", "out.raw"]);
        command.output().expect("ours")
    };
    let out = run("secret,id=s,data=shut");
    assert!(!out.status.success() && tunnels.load(Ordering::SeqCst) == 0, "{}", text(&out.stderr));
    let out = run("secret,id=s,data=open");
    assert!(out.status.success() && tunnels.load(Ordering::SeqCst) != 0, "{}", text(&out.stderr));
    bed.ok("theirs", &["compare", "-f", "raw", "-F", "raw", "in.raw", "out.raw"]);
}
