//! TLS with certificates of both sides, made by certtool (Debian: gnutls-bin): what is not in order is refused.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use holdfast_migration::frame::{Preamble, Role};
use holdfast_migration::{Address, Control, Listener, MigrationError, Parameters, Stream, Tls};

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
