//! Certificates made by GnuTLS's certtool.

use std::path::Path;
use std::process::Command;

use crate::devices::run;

/// Makes in `dir` what `tls-creds-x509` looks for there: an authority, and a server and a client called `name`, all of them valid.
///
/// # Panics
/// If it cannot: gnutls-bin is needed.
pub fn certificates(dir: &Path, name: &str) {
    let certtool = |args: &[&str]| run(Command::new("certtool").current_dir(dir).args(args));
    let kind = if name.parse::<std::net::IpAddr>().is_ok() { "ip_address" } else { "dns_name" };
    let templates = [
        ("ca", "cn = Tests\nca\ncert_signing_key\n".to_owned()),
        ("server", format!("cn = {name}\n{kind} = {name}\ntls_www_server\nencryption_key\nsigning_key\n")),
        ("client", format!("cn = {name}\ntls_www_client\nencryption_key\nsigning_key\n")),
    ];
    for (who, words) in templates {
        let (key, cert, template) =
            (format!("{who}-key.pem"), format!("{who}-cert.pem"), format!("{who}.info"));
        std::fs::write(dir.join(&template), words).expect("template");
        certtool(&["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", &key]);
        let mut args = vec!["--template", &template, "--load-privkey", &key, "--outfile", &cert];
        if who == "ca" {
            args.push("--generate-self-signed");
        } else {
            args.extend(["--generate-certificate", "--load-ca-certificate", "ca-cert.pem"]);
            args.extend(["--load-ca-privkey", "ca-key.pem"]);
        }
        certtool(&args);
    }
}
