//! TLS with certificates of both sides, made by certtool (Debian: gnutls-bin): what is not in order is refused.

mod common;

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use holdfast_block::raw::{LockRange, RawImage, RawOptions};
use holdfast_migration::frame::{Preamble, Role};
use holdfast_migration::{
    Address, Control, Listener, MigrationError, Parameters, SendTo, Stream, Tls, receive, send,
};
use holdfast_threads::{PlainSpawner, Spawner};

use common::{Disk, Here, There};

fn certtool(dir: &Path, args: &[&str]) {
    let out = Command::new("certtool").current_dir(dir).args(args).output();
    let out = out.expect("certtool (Debian: gnutls-bin)");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// An authority's directory (RSA: the TLS library takes no elliptic-curve key with a padded scalar, which GnuTLS may make), with certificates of a server called `server` and of a client.
fn certificates(dir: &Path, server: &str) {
    std::fs::create_dir(dir).expect("directory");
    let usage = "encryption_key\nsigning_key\n";
    for (who, words) in [
        ("ca", "cn = Test\nca\ncert_signing_key\n".to_owned()),
        ("server", format!("cn = server\n{server}\ntls_www_server\n{usage}")),
        ("client", format!("cn = client\ntls_www_client\n{usage}")),
    ] {
        std::fs::write(dir.join(format!("{who}.info")), words).expect("template");
        let (key, info, cert) = (format!("{who}-key.pem"), format!("{who}.info"), format!("{who}-cert.pem"));
        certtool(dir, &["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", &key]);
        let mut args = vec!["--template", &info, "--load-privkey", &key, "--outfile", &cert];
        if who == "ca" {
            args.push("--generate-self-signed");
        } else {
            args.push("--generate-certificate");
            args.extend(["--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem"]);
        }
        certtool(dir, &args);
    }
}

/// Connects with `client`'s certificates, or none, to a server with those in `server`.
fn connect(server: &Path, client: Option<&Path>) -> Result<(), MigrationError> {
    let control = Control::new(Parameters::default());
    let listener = Listener::bind(&Address::Tcp("127.0.0.1".into(), 0), Some(Tls::load(server, true)?))?;
    let port = listener.port().expect("a port");
    let serving = std::thread::spawn(move || {
        let control = Arc::new(Control::new(Parameters::default()));
        let (mut stream, preamble) = listener.accept(&control, None)?;
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a byte");
        stream.write_all(&[byte[0], preamble.session[0]]).expect("sent");
        Ok::<_, MigrationError>(())
    });
    let preamble = Preamble { role: Role::Main, session: [8; 16] };
    let tls = client.map(|dir| Tls::load(dir, false)).transpose()?;
    let connected =
        Stream::connect(&Address::Tcp("127.0.0.1".into(), port), tls.as_ref(), &preamble, &control);
    let result = connected.map(|mut stream| {
        let mut answer = [0; 2];
        stream.write_all(&[5]).expect("sent");
        stream.read_exact(&mut answer).expect("two bytes");
        assert_eq!(answer, [5, 8]);
    });
    let served = serving.join().expect("no panic");
    assert_eq!(result.is_ok(), served.is_ok(), "both sides see it alike");
    result
}

#[test]
fn who_has_no_good_certificate_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let [good, other, named] = ["good", "other", "named"].map(|name| dir.path().join(name));
    certificates(&good, "ip_address = 127.0.0.1");
    certificates(&other, "ip_address = 127.0.0.1");
    certificates(&named, "dns_name = vm.example");
    connect(&good, Some(&good)).expect("all in order");
    connect(&good, Some(&other)).expect_err("another authority");
    connect(&named, Some(&named)).expect_err("another host's name");
    connect(&good, None).expect_err("no TLS at all");
    std::fs::remove_file(good.join("client-cert.pem")).expect("there");
    let error = connect(&good, Some(&good)).expect_err("no client certificate").to_string();
    assert!(error.contains("client-cert.pem"), "{error}");
    let unix =
        Listener::bind(&Address::Unix(dir.path().join("s")), Some(Tls::load(&good, true).expect("good")));
    assert!(matches!(unix, Err(MigrationError::Tls(_))));
}

#[test]
fn disks_go_along_under_tls() {
    let dir = tempfile::tempdir().expect("directory");
    let keys = dir.path().join("keys");
    certificates(&keys, "ip_address = 127.0.0.1");
    let host = "127.0.0.1".to_owned();
    let listener =
        Listener::bind(&Address::Tcp(host.clone(), 0), Some(Tls::load(&keys, true).expect("keys")));
    let listener = listener.expect("a socket");
    let to = SendTo {
        address: Address::Tcp(host, listener.port().expect("a port")),
        tls: Some(Tls::load(&keys, false).expect("keys")),
        connections: 2,
        local: false,
        mirror: true,
        direct: false,
        postcopy: false,
        session: [8; 16],
    };
    let bytes: Vec<u8> = (0..3_u32 << 20).map(|n| (n >> 9) as u8).collect();
    let writes = [(5000, 1, 5000), (70, 2, 1 << 20), (2 << 20, 0, 1 << 20)];
    let disk = Disk { id: "vda", bytes: bytes.into(), writes: parking_lot::Mutex::new(writes.into()) };
    let path = dir.path().join("image");
    std::fs::write(&path, vec![7; 3 << 20]).expect("an image");
    let options = RawOptions { lock: LockRange::None, ..RawOptions::new(path) };
    let spawner: Arc<dyn Spawner> = PlainSpawner::shared();
    let image = RawImage::open(options, Arc::clone(&spawner)).expect("an image");
    let mut there = There::new(vec![image]);
    let target = std::thread::spawn(move || {
        let control = Arc::new(Control::new(Parameters::default()));
        let received = receive(&listener, &mut there, &control, &PlainSpawner::shared());
        received.expect("received");
        there
    });
    let here = Here::new(vec![disk]);
    let control = Arc::new(Control::new(Parameters::default()));
    send(&here, &to, &control, &spawner).expect("sent");
    let there = target.join().expect("no panic");
    let mut image = vec![1; 3 << 20];
    there.images[0].read_at(0, &mut image).expect("read");
    assert!(there.runs && *here.disks[0].bytes.lock() == image);
}
