//! Our NBD server and client beside those of QEMU, libnbd and nbdkit (Debian: qemu-utils, libnbd-bin, nbdkit, gnutls-bin).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

struct Bed(tempfile::TempDir);

/// A server that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Bed {
    fn new() -> Self {
        let bed = Self(tempfile::tempdir().expect("directory"));
        let data: Vec<u8> = (0..2u32 << 20)
            .map(|n| if n >> 17 & 1 == 0 { 0 } else { (n.wrapping_mul(2_654_435_761) >> 13) as u8 })
            .collect();
        std::fs::write(bed.dir().join("in.raw"), data).expect("data");
        for name in ["holdfast-nbd", "holdfast-io"] {
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_holdfast-img"), bed.dir().join(name))
                .expect("link");
        }
        bed
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, program: &str) -> Command {
        let program: PathBuf = match program {
            "img" => env!("CARGO_BIN_EXE_holdfast-img").into(),
            "nbd" => self.dir().join("holdfast-nbd"),
            "io" => self.dir().join("holdfast-io"),
            other => other.into(),
        };
        let mut command = Command::new(program);
        command.current_dir(self.dir());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let out = self.command(program).args(args).output();
        out.unwrap_or_else(|e| panic!("{program}: {e} (Debian: qemu-utils, libnbd-bin, nbdkit, gnutls-bin)"))
    }

    fn ok(&self, program: &str, args: &[&str]) -> String {
        let out = self.run(program, args);
        assert!(out.status.success(), "{program} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }

    /// A server at the socket `s`, once it is there.
    fn serve(&self, program: &str, args: &[&str]) -> Running {
        let _ = std::fs::remove_file(self.dir().join("s"));
        let child = self.command(program).args(args).stdin(Stdio::null()).spawn().expect("server");
        let mut running = Running(child);
        let until = Instant::now() + Duration::from_secs(120);
        while std::os::unix::net::UnixStream::connect(self.dir().join("s")).is_err() {
            assert!(running.0.try_wait().expect("server").is_none(), "{program} {args:?} has ended");
            assert!(Instant::now() < until, "{program} {args:?} does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    }

    /// The socket's name: QEMU's tools want it absolute.
    fn socket(&self) -> String {
        self.dir().join("s").display().to_string()
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.dir().join("s").display())
    }

    /// Certificates of an authority, a server called `vm.example` and a client.
    fn certificates(&self, dir: &str) {
        let dir = self.dir().join(dir);
        std::fs::create_dir(&dir).expect("directory");
        let make = |args: &[&str]| {
            let out = Command::new("certtool")
                .current_dir(&dir)
                .args(args)
                .output()
                .expect("certtool (Debian: gnutls-bin)");
            assert!(out.status.success(), "{}", text(&out.stderr));
        };
        let template = |name: &str, words: &str| std::fs::write(dir.join(name), words).expect("template");
        template("ca.info", "cn = Test\nca\ncert_signing_key\n");
        template(
            "server.info",
            "cn = vm.example\ndns_name = vm.example\ntls_www_server\nencryption_key\nsigning_key\n",
        );
        template("client.info", "cn = client\ntls_www_client\nencryption_key\nsigning_key\n");
        for who in ["ca", "server", "client"] {
            let key = format!("{who}-key.pem");
            make(&["--generate-privkey", "--rsa", "--bits", "2048", "--outfile", &key]);
        }
        make(&[
            "--generate-self-signed",
            "--template",
            "ca.info",
            "--load-privkey",
            "ca-key.pem",
            "--outfile",
            "ca-cert.pem",
        ]);
        for who in ["server", "client"] {
            make(&[
                "--generate-certificate",
                "--load-ca-certificate",
                "ca-cert.pem",
                "--load-ca-privkey",
                "ca-key.pem",
                "--load-privkey",
                &format!("{who}-key.pem"),
                "--template",
                &format!("{who}.info"),
                "--outfile",
                &format!("{who}-cert.pem"),
            ]);
        }
    }
}

#[test]
fn others_read_and_write_what_we_serve() {
    let bed = Bed::new();
    bed.ok("img", &["convert", "-O", "qcow2", "in.raw", "a.qcow2"]);
    bed.ok("img", &["bitmap", "--add", "--disable", "a.qcow2", "b0"]);
    let running = bed.serve(
        "nbd",
        &[
            "-t",
            "-e",
            "0",
            "-k",
            "s",
            "-f",
            "qcow2",
            "-x",
            "exp",
            "-D",
            "some text",
            "-B",
            "b0",
            "-A",
            "a.qcow2",
        ],
    );
    let uri = bed.uri("exp");
    let info = bed.ok("nbdinfo", &[&uri]);
    for word in [
        "export-size: 2097152",
        "some text",
        "base:allocation",
        "qemu:dirty-bitmap:b0",
        "qemu:allocation-depth",
        "can_multi_conn: true",
    ] {
        assert!(info.contains(word), "{word}: {info}");
    }
    let (ours, theirs) =
        (bed.ok("nbd", &["-L", "-k", "s"]), bed.ok("qemu-nbd", &["-L", "-k", &bed.socket()]));
    // Before version 8.2 nobody asked for that.
    let size = "  transaction size: 32-bit\n";
    assert_eq!(if theirs.contains(size) { ours } else { ours.replace(size, "") }, theirs);
    let map = bed.ok("nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
    bed.ok("nbdcopy", &[&uri, "out.raw"]);
    // By libnbd's shell (nbdsh, whatever python3 is first in the path), which can also ask for what is not there (Debian: python3-libnbd).
    let script = "\
assert h.get_size() == 2097152 and h.can_meta_context('base:allocation')
assert h.pread(4096, 4096) == open('in.raw', 'rb').read(8192)[4096:]
h.set_strict_mode(0)
try:
    h.pread(512, 1 << 62)
    assert False
except nbd.Error as error:
    assert error.errno == 'EINVAL', error
assert h.pread(512, 0) == open('in.raw', 'rb').read(512)
";
    bed.ok("/usr/bin/python3", &["-m", "nbd", "--base-allocation", "-u", &uri, "-c", script]);
    bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", "in.raw", "out.raw"]);
    bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", "in.raw", &uri]);
    // Written by others, read by ours, and back.
    std::fs::write(bed.dir().join("new.raw"), vec![0x5a; 2 << 20]).expect("data");
    bed.ok("nbdcopy", &["new.raw", &uri]);
    bed.ok("img", &["compare", "-f", "raw", "-F", "raw", "new.raw", &uri]);
    bed.ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "in.raw", &uri]);
    bed.ok(
        "qemu-io",
        &["-f", "raw", "-c", "write -z -u 0 64k", "-c", "discard 64k 64k", "-c", "flush", &uri],
    );
    bed.ok("img", &["compare", "-f", "raw", "-F", "raw", "in.raw", &uri]);
    assert!(!bed.run("nbdinfo", &[&bed.uri("other")]).status.success());
    drop(running);
    bed.ok("qemu-img", &["check", "-r", "leaks", "a.qcow2"]);
    bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "in.raw", "a.qcow2"]);
}

#[test]
fn we_read_and_write_what_others_serve() {
    let bed = Bed::new();
    let socket = bed.socket();
    let qemu: (&str, &[&str]) = ("qemu-nbd", &["-t", "-e", "8", "-k", &socket, "-f", "raw", "b.raw"]);
    let nbdkit: (&str, &[&str]) = ("nbdkit", &["-f", "-U", "s", "file", "b.raw"]);
    // Blocks of 4096 bytes at least, and no structured replies.
    let blocks: (&str, &[&str]) = (
        "nbdkit",
        &[
            "-f",
            "-U",
            "s",
            "--no-sr",
            "--filter=blocksize-policy",
            "file",
            "b.raw",
            "blocksize-minimum=4096",
            "blocksize-error-policy=error",
        ],
    );
    // nbdkit 1.32 has the filter; where it has not, the others are enough.
    let has_blocks =
        bed.run("nbdkit", &["--dump-plugin", "--filter=blocksize-policy", "file"]).status.success();
    let servers = [Some(qemu), Some(nbdkit), has_blocks.then_some(blocks)];
    for (program, args) in servers.into_iter().flatten() {
        std::fs::copy(bed.dir().join("in.raw"), bed.dir().join("b.raw")).expect("copied");
        let running = bed.serve(program, args);
        let uri = bed.uri("");
        bed.ok("img", &["compare", "-f", "raw", "-F", "raw", "in.raw", &uri]);
        bed.ok("img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "c.qcow2"]);
        bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "in.raw", "c.qcow2"]);
        bed.ok(
            "io",
            &["-f", "raw", "-c", "write -P 9 100 5000", "-c", "read -P 9 100 5000", "-c", "flush", &uri],
        );
        bed.ok("qemu-io", &["-f", "raw", "-c", "read -P 9 100 5000", &uri]);
        drop(running);
        let bytes = std::fs::read(bed.dir().join("b.raw")).expect("data");
        assert!(bytes[100..5100].iter().all(|b| *b == 9) && bytes[5100] == 0, "{program}");
    }
    // A server that takes its time, for reads more than for writes.
    std::fs::copy(bed.dir().join("in.raw"), bed.dir().join("b.raw")).expect("copied");
    let slow = ["-f", "-U", "s", "--filter=delay", "file", "b.raw", "rdelay=80ms", "wdelay=20ms"];
    let running = bed.serve("nbdkit", &slow);
    bed.ok("img", &["compare", "-f", "raw", "-F", "raw", "in.raw", &bed.uri("")]);
    bed.ok(
        "io",
        &["-f", "raw", "-c", "aio_write -P 7 0 4k", "-c", "aio_read 1M 64k", "-c", "aio_flush", &bed.uri("")],
    );
    drop(running);
    assert!(std::fs::read(bed.dir().join("b.raw")).expect("data")[..4096].iter().all(|b| *b == 7));
    // Errors of a server are errors of requests.
    let _running = bed.serve(
        "nbdkit",
        &["-f", "-U", "s", "--filter=error", "file", "b.raw", "error-pread=ENOMEM", "error-pread-rate=100%"],
    );
    let out = bed.run("io", &["-f", "raw", "-r", "-c", "read 0 512", &bed.uri("")]);
    assert!(!out.status.success() && text(&out.stderr).to_string().len() + text(&out.stdout).len() > 0);
}

#[test]
fn tls_is_required_where_it_is_configured() {
    let bed = Bed::new();
    bed.certificates("pki");
    bed.certificates("others");
    let server = "tls-creds-x509,id=t,dir=pki,endpoint=server";
    let client = "tls-creds-x509,id=t,dir=pki,endpoint=client";
    let stranger = "tls-creds-x509,id=t,dir=others,endpoint=client";
    let image = |extra: &str| format!("driver=raw,file.driver=nbd,file.path=s,file.tls-creds=t{extra}");
    let named = image(",file.tls-hostname=vm.example");
    let compare = |object: &str, opened: &str| {
        bed.run(
            "img",
            &["compare", "--object", object, "--image-opts", "driver=raw,file.filename=in.raw", opened],
        )
    };
    let running = bed.serve(
        "nbd",
        &["-t", "-e", "0", "-k", "s", "-f", "raw", "--object", server, "--tls-creds", "t", "in.raw", "-r"],
    );
    // Plain clients are sent away.
    assert!(!bed.run("nbdinfo", &[&bed.uri("")]).status.success());
    assert!(!bed.run("qemu-img", &["info", &bed.uri("")]).status.success());
    let out = bed.run("img", &["info", &bed.uri("")]);
    assert!(text(&out.stderr).contains("TLS"), "{}", text(&out.stderr));
    // Ours, by the name that the certificate has.
    let out = compare(client, &named);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(!compare(client, &image(",file.tls-hostname=other.example")).status.success());
    assert!(!compare(client, &image("")).status.success());
    assert!(!compare(stranger, &named).status.success());
    // Theirs.
    let socket = bed.dir().join("s");
    let uri = format!(
        "nbds+unix:///?socket={}&tls-certificates={}",
        socket.display(),
        bed.dir().join("pki").display()
    );
    bed.ok("nbdcopy", &[&uri, "out.raw"]);
    assert!(
        std::fs::read(bed.dir().join("out.raw")).expect("out")
            == std::fs::read(bed.dir().join("in.raw")).expect("in")
    );
    drop(running);
    // Our client at a server of theirs.
    let _running = bed.serve(
        "nbdkit",
        &[
            "-f",
            "-U",
            "s",
            "--tls=require",
            "--tls-certificates=pki",
            "--tls-verify-peer",
            "-r",
            "file",
            "in.raw",
        ],
    );
    let out = compare(client, &named);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(!compare(stranger, &named).status.success());
}

#[test]
fn a_server_in_the_background_ends_with_its_last_client() {
    let bed = Bed::new();
    bed.ok("nbd", &["--fork", "--pid-file", "pid", "-r", "-k", "s", "-f", "raw", "in.raw"]);
    assert!(bed.dir().join("pid").exists());
    bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", "in.raw", &bed.uri("")]);
    let until = Instant::now() + Duration::from_secs(120);
    while bed.dir().join("s").exists() || bed.dir().join("pid").exists() {
        assert!(Instant::now() < until, "the server does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn io_says_what_qemu_io_says() {
    let bed = Bed::new();
    bed.ok("img", &["convert", "-O", "qcow2", "in.raw", "a.qcow2"]);
    std::fs::copy(bed.dir().join("a.qcow2"), bed.dir().join("b.qcow2")).expect("copied");
    // Lines with times are not compared.
    let lines = |out: &Output| -> Vec<String> {
        text(&out.stdout).lines().filter(|l| !l.contains("ops/sec")).map(str::to_owned).collect()
    };
    for script in [
        &["write -P 3 0 4k", "read -P 3 0 4k", "read -v 0 32", "length"][..],
        &["read -P 4 0 4k"],
        &["read -P 3 -s 512 -l 512 0 4k"],
        &["write -z 0 64k", "read -P 0 0 64k", "alloc 0 2M", "map"],
        &["writev -P 1 128k 512 1k", "readv -P 1 128k 512 1k", "discard 0 64k", "map"],
        &["truncate 3M", "length", "read 3M 512"],
        &["bogus"],
        &["read 0"],
        &["read 10M 1k"],
        &["flush", "aio_write -P 7 0 4k", "aio_flush", "quit", "read 0 512"],
        &[
            "aio_write -P 5 64k 72k",
            "aio_flush",
            "aio_read -P 5 60k 512 512",
            "aio_flush",
            "aio_read -v 64k 32",
        ],
        &["aio_write -z -u 64k 64k", "aio_flush", "aio_read -P 0 64k 64k", "aio_flush", "map"],
        &["aio_write -f -q -P 8 4k 512", "aio_read -q -P 8 0 512", "aio_flush", "read -P 8 4k 512"],
        &["aio_read 10M 512", "aio_write 10M 512"],
        &["aio_write -u 0 512"],
    ] {
        let with = |program: &str, image: &str| {
            let mut args: Vec<&str> = script.iter().flat_map(|c| ["-c", c]).collect();
            args.push(image);
            bed.run(program, &args)
        };
        let (ours, theirs) = (with("io", "a.qcow2"), with("qemu-io", "b.qcow2"));
        assert_eq!(ours.status.code(), theirs.status.code(), "{script:?}: {}", text(&ours.stderr));
        // What QEMU says on standard error differs between versions.
        let known = |l: &Vec<String>| {
            l.iter()
                .filter(|l| !l.contains("failed") && !l.contains("not found") && !l.contains("bad argument"))
                .cloned()
                .collect::<Vec<_>>()
        };
        assert_eq!(known(&lines(&ours)), known(&lines(&theirs)), "{script:?}");
    }
    bed.ok("qemu-img", &["check", "a.qcow2"]);
    bed.ok("qemu-img", &["compare", "a.qcow2", "b.qcow2"]);
}

#[test]
fn clients_are_let_in_by_the_names_in_their_certificates() {
    let bed = Bed::new();
    bed.certificates("pki");
    // A client with a longer name, and keys on elliptic curves.
    std::fs::create_dir(bed.dir().join("named")).expect("directory");
    std::fs::copy(bed.dir().join("pki/ca-cert.pem"), bed.dir().join("named/ca-cert.pem")).expect("authority");
    let template = "cn = Fred\norganization = Hold, fast\nunit = Disks\nlocality = R'lyeh\ncountry = GB\ntls_www_client\nsigning_key\n";
    std::fs::write(bed.dir().join("named/info"), template).expect("template");
    let key = ["--generate-privkey", "--key-type", "ecdsa", "--curve", "secp256r1", "--outfile"];
    bed.ok("certtool", &[&key[..], &["named/client-key.pem"]].concat());
    let authority = ["--load-ca-certificate", "pki/ca-cert.pem", "--load-ca-privkey", "pki/ca-key.pem"];
    let issue =
        ["--generate-certificate", "--load-privkey", "named/client-key.pem", "--template", "named/info"];
    bed.ok("certtool", &[&issue[..], &authority[..], &["--outfile", "named/client-cert.pem"]].concat());
    let uri = |dir: &str| {
        let dir = bed.dir().join(dir);
        format!("nbds+unix:///?socket={}&tls-certificates={}", bed.socket(), dir.display())
    };
    // Rules, and whether `CN=client` and Fred are let in.
    let fred = "C=GB,,L=R'lyeh,,O=Hold\\,, fast,,OU=Disks,,CN=Fred";
    let glob = "authz-list,id=z,rules.0.match=*Fred*,rules.0.policy=allow,rules.0.format=glob";
    std::fs::write(
        bed.dir().join("rules.json"),
        r#"{"policy":"allow","rules":[{"match":"CN=client","policy":"deny","format":"exact"}]}"#,
    )
    .expect("rules");
    let file = format!("authz-list-file,id=z,filename={}", bed.dir().join("rules.json").display());
    let cases = [
        ("authz-simple,id=z,identity=CN=client".to_owned(), [true, false]),
        (format!("authz-simple,id=z,identity={fred}"), [false, true]),
        (glob.to_owned(), [false, true]),
        (file, [false, true]),
    ];
    let creds = format!("tls-creds-x509,id=t,dir={},endpoint=server", bed.dir().join("pki").display());
    for (rules, allowed) in cases {
        for server in ["nbd", "qemu-nbd"] {
            // Debian 12's has no lists in files.
            if server == "qemu-nbd" && rules.starts_with("authz-list-file") {
                continue;
            }
            let socket = bed.socket();
            let args = ["-t", "-e", "0", "-k", &socket, "-f", "raw", "--object", &creds, "--tls-creds", "t"];
            let guard = ["--object", &rules, "--tls-authz", "z", "-r", "in.raw"];
            let _running = bed.serve(server, &[&args[..], &guard[..]].concat());
            let entered =
                ["pki", "named"].map(|dir| bed.run("nbdinfo", &["--size", &uri(dir)]).status.success());
            assert_eq!(entered, allowed, "{server} {rules}");
        }
    }
    let out = bed.run("nbd", &["-k", "s", "-f", "raw", "--object", glob, "--tls-authz", "z", "in.raw"]);
    assert!(text(&out.stderr).contains("needs --tls-creds"), "{}", text(&out.stderr));
}

#[test]
fn an_encrypted_key_is_opened_by_a_secret() {
    let bed = Bed::new();
    bed.certificates("pki");
    let encrypt = ["pkcs8", "-topk8", "-in", "pki/server-key.pem", "-passout", "pass:open", "-out"];
    std::fs::create_dir(bed.dir().join("locked")).expect("directory");
    for name in ["ca-cert.pem", "server-cert.pem"] {
        std::fs::copy(bed.dir().join("pki").join(name), bed.dir().join("locked").join(name)).expect("copy");
    }
    let serve = |secret: &str, id: &str| {
        let creds = format!("tls-creds-x509,id=t,dir=locked,endpoint=server{id}");
        [
            "-e",
            "1",
            "-k",
            "s",
            "-f",
            "raw",
            "-r",
            "--object",
            secret,
            "--object",
            &creds,
            "--tls-creds",
            "t",
            "in.raw",
        ]
        .map(str::to_owned)
    };
    // OpenSSL's usual way, and an older one.
    for how in [["-v2", "aes-256-cbc"], ["-v2prf", "hmacWithSHA1"]] {
        bed.ok("openssl", &[&encrypt[..], &["locked/server-key.pem"], &how[..]].concat());
        let said = |args: [String; 14]| {
            let out = bed.run("nbd", &args.each_ref().map(String::as_str));
            assert_eq!(out.status.code(), Some(1));
            text(&out.stderr)
        };
        assert!(said(serve("secret,id=k,data=open", "")).contains("the private key is encrypted"));
        let wrong = said(serve("secret,id=k,data=shut", ",passwordid=k"));
        assert!(wrong.contains("the password does not open the private key"), "{wrong}");
        let args = serve("secret,id=k,data=open", ",passwordid=k");
        let _running = bed.serve("nbd", &[&["-t"][..], &args.each_ref().map(String::as_str)[..]].concat());
        let dir = bed.dir().join("pki");
        let uri = format!("nbds+unix:///?socket={}&tls-certificates={}", bed.socket(), dir.display());
        bed.ok("nbdinfo", &["--size", &uri]);
    }
}

#[test]
fn requests_of_io_overlap_and_are_waited_for() {
    let bed = Bed::new();
    bed.ok("img", &["convert", "-O", "qcow2", "in.raw", "a.qcow2"]);
    bed.ok("img", &["create", "-q", "-f", "raw", "b.raw", "2M"]);
    for image in ["a.qcow2", "b.raw"] {
        for aio in ["threads", "io_uring"] {
            let script: String =
                (0..32).map(|n| format!("aio_write -q -P {} {}k 64k\n", n + 1, n * 64)).collect();
            let checks: String =
                (0..32).map(|n| format!("aio_read -P {} {}k 64k\n", n + 1, n * 64)).collect();
            let format = if image == "b.raw" { "raw" } else { "qcow2" };
            let mut child = bed.command("io");
            let child =
                child.args(["-i", aio, "-f", format, image]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = child.spawn().expect("io");
            let all = format!("{script}aio_flush\n{checks}");
            std::io::Write::write_all(&mut child.stdin.take().expect("input"), all.as_bytes())
                .expect("script");
            let out = child.wait_with_output().expect("io");
            let said = text(&out.stdout);
            assert!(out.status.success() && !said.contains("failed"), "{said}");
            assert_eq!(said.matches("read 65536/65536 bytes").count(), 32, "{said}");
        }
    }
    bed.ok("qemu-img", &["check", "-q", "a.qcow2"]);
    bed.ok("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "b.raw"]);
}

#[test]
fn io_and_nbd_write_to_temporary_files_over_images() {
    let bed = Bed::new();
    let same = || bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", "in.raw", "copy.raw"]);
    std::fs::copy(bed.dir().join("in.raw"), bed.dir().join("copy.raw")).expect("copied");
    bed.ok("io", &["-s", "-f", "raw", "-c", "write -P 9 0 1M", "-c", "read -P 9 64k 4k", "copy.raw"]);
    same();
    let running = bed.serve("nbd", &["-t", "-e", "0", "-k", "s", "-f", "raw", "--snapshot", "copy.raw"]);
    bed.ok("qemu-io", &["-f", "raw", "-c", "write -P 9 0 1M", "-c", "read -P 9 64k 4k", &bed.uri("")]);
    bed.ok("io", &["-f", "raw", "-c", "read -P 9 512k 4k", &bed.uri("")]);
    drop(running);
    same();
    // What is read from below stays, where that is asked for.
    bed.ok("img", &["create", "-q", "-f", "qcow2", "-b", "in.raw", "-F", "raw", "top.qcow2"]);
    bed.ok(
        "io",
        &["-C", "-m", "-c", "read 100k 64k", "-c", "aio_read 1M 1k", "-c", "aio_flush", "top.qcow2"],
    );
    let runs = bed.ok("qemu-io", &["-c", "alloc 0 2M", "top.qcow2"]);
    assert!(runs.starts_with("196608/2097152 bytes"), "{runs}");
    bed.ok("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "in.raw", "top.qcow2"]);
    // Direct I/O from memory that is not aligned for it.
    bed.ok("io", &["-m", "-n", "-f", "raw", "-c", "write -P 4 0 8k", "-c", "read -P 4 0 8k", "copy.raw"]);
    bed.ok("qemu-io", &["-f", "raw", "-c", "read -P 4 0 8k", "copy.raw"]);
    for (program, other, args) in [
        ("io", "qemu-io", &["-r", "-C", "-f", "raw", "-c", "quit", "in.raw"][..]),
        ("io", "qemu-io", &["-k", "-f", "raw", "-c", "quit", "in.raw"]),
        ("io", "qemu-io", &["-i", "fast", "-f", "raw", "-c", "quit", "in.raw"]),
        ("nbd", "qemu-nbd", &["--aio", "native", "-f", "raw", "in.raw"]),
        ("nbd", "qemu-nbd", &["--aio", "fast", "-f", "raw", "in.raw"]),
        ("nbd", "qemu-nbd", &["--detect-zeroes", "unmap", "-f", "raw", "in.raw"]),
    ] {
        let (ours, theirs) = (bed.run(program, args), bed.run(other, args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}: {}", text(&ours.stderr));
        let said = |out: &Output| text(&out.stderr).trim_end().rsplit(": ").next().map(str::to_owned);
        assert_eq!(said(&ours), said(&theirs), "{args:?}");
    }
    let out = bed.run("nbd", &["--handshake-limit", "x", "-f", "raw", "in.raw"]);
    assert!(text(&out.stderr).contains("Invalid handshake limit 'x'"));
}

#[test]
fn clients_that_say_nothing_are_sent_away() {
    let bed = Bed::new();
    let args = ["-t", "-e", "0", "-k", "s", "-f", "raw", "--handshake-limit", "1", "in.raw"];
    let running = bed.serve("nbd", &args);
    let mut silent = std::os::unix::net::UnixStream::connect(bed.dir().join("s")).expect("connected");
    silent.set_read_timeout(Some(Duration::from_secs(120))).expect("timeout");
    let mut greeting = Vec::new();
    std::io::Read::read_to_end(&mut silent, &mut greeting).expect("the server closes");
    assert!(greeting.starts_with(b"NBDMAGIC"));
    drop(running);
}
