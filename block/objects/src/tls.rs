//! `tls-creds-x509` objects: certificates in a directory with the names that QEMU gives them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

pub use rustls::pki_types::ServerName;
pub use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};

use crate::{Fields, ObjectError, bad};

/// Which side of connections credentials are for.
#[derive(Debug, Clone)]
enum Endpoint {
    Server(Arc<ServerConfig>),
    Client(Arc<ClientConfig>),
}

/// Certificates and keys, ready for use.
#[derive(Debug, Clone)]
pub struct TlsCreds(Endpoint);

/// The name that a server's certificate is compared with.
pub fn server_name(name: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(name.to_owned()).ok()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>, ObjectError> {
    std::fs::read(path).map_err(|source| ObjectError::Read { path: path.display().to_string(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ObjectError> {
    let all: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err(bad(format!("Unable to import server certificate {}", path.display()))),
    }
}

/// The certificate chain of one side and its key.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(dir: &Path, side: &str) -> Result<Identity, ObjectError> {
    let key = dir.join(format!("{side}-key.pem"));
    let bytes = zeroize::Zeroizing::new(read(&key)?);
    if bytes.windows(9).any(|w| w == b"ENCRYPTED") {
        return Err(bad(format!(
            "{}: encrypted private keys are not supported by this version",
            key.display()
        )));
    }
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| bad(format!("{}: there is no private key in PEM format", key.display())))?;
    Ok((certificates(&dir.join(format!("{side}-cert.pem")))?, key))
}

fn roots(dir: &Path) -> Result<Arc<RootCertStore>, ObjectError> {
    let path = dir.join("ca-cert.pem");
    let mut store = RootCertStore::empty();
    for certificate in certificates(&path)? {
        store.add(certificate).map_err(|e| bad(format!("{}: {e}", path.display())))?;
    }
    Ok(Arc::new(store))
}

fn revoked(dir: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, ObjectError> {
    let path = dir.join("ca-crl.pem");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let all: Result<Vec<_>, pem::Error> =
        CertificateRevocationListDer::pem_slice_iter(&read(&path)?).collect();
    all.map_err(|_| bad(format!("{}: there is no revocation list in PEM format", path.display())))
}

fn server(dir: &Path, verify: bool) -> Result<ServerConfig, ObjectError> {
    let say = |e: String| bad(format!("{}: {e}", dir.display()));
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| say(e.to_string()))?;
    let builder = if verify {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(dir)?, provider)
            .with_crls(revoked(dir)?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| say(e.to_string()))?;
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let (chain, key) = identity(dir, "server")?;
    builder.with_single_cert(chain, key).map_err(|e| say(e.to_string()))
}

fn client(dir: &Path) -> Result<ClientConfig, ObjectError> {
    let say = |e: String| bad(format!("{}: {e}", dir.display()));
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| say(e.to_string()))?
        .with_root_certificates(roots(dir)?);
    // A client without a certificate can speak to servers that do not ask for one.
    if !dir.join("client-cert.pem").exists() {
        return Ok(builder.with_no_client_auth());
    }
    let (chain, key) = identity(dir, "client")?;
    builder.with_client_auth_cert(chain, key).map_err(|e| say(e.to_string()))
}

impl TlsCreds {
    pub(crate) fn from_fields(fields: &mut Fields) -> Result<Self, ObjectError> {
        let dir = PathBuf::from(fields.text("dir")?.ok_or_else(|| bad("Parameter 'dir' is missing"))?);
        let verify = fields.flag("verify-peer")?.unwrap_or(true);
        for key in ["priority", "passwordid"] {
            if fields.text(key)?.is_some() {
                return Err(bad(format!("tls-creds-x509: '{key}' is not supported by this version")));
            }
        }
        // Certificates are checked as they are used, in any case.
        fields.flag("sanity-check")?;
        match fields.text("endpoint")?.as_deref() {
            Some("server") => Ok(Self(Endpoint::Server(Arc::new(server(&dir, verify)?)))),
            None | Some("client") if !verify => {
                Err(bad("tls-creds-x509: a client that does not verify its server is not supported"))
            }
            None | Some("client") => Ok(Self(Endpoint::Client(Arc::new(client(&dir)?)))),
            Some(other) => Err(bad(format!("Parameter 'endpoint' does not accept value '{other}'"))),
        }
    }

    /// For servers.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if these are a client's.
    pub fn server(&self) -> Result<Arc<ServerConfig>, ObjectError> {
        match &self.0 {
            Endpoint::Server(config) => Ok(Arc::clone(config)),
            Endpoint::Client(_) => Err(bad("Expecting TLS credentials with a server endpoint")),
        }
    }

    /// For clients.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if these are a server's.
    pub fn client(&self) -> Result<Arc<ClientConfig>, ObjectError> {
        match &self.0 {
            Endpoint::Client(config) => Ok(Arc::clone(config)),
            Endpoint::Server(_) => Err(bad("Expecting TLS credentials with a client endpoint")),
        }
    }
}
