//! `tls-creds-x509` objects: certificates in a directory with the names that QEMU gives them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use x509_cert::der::Decode;

pub use rustls::pki_types::ServerName;
pub use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};

use crate::{Fields, ObjectError, Objects, Secret, bad, keys};

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

/// The cryptography that all TLS here uses.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ObjectError> {
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

fn identity(dir: &Path, side: &str, password: Option<&Secret>) -> Result<Identity, ObjectError> {
    let key = keys::private_key(&dir.join(format!("{side}-key.pem")), password)?;
    Ok((certificates(&dir.join(format!("{side}-cert.pem")))?, key))
}

/// The distinguished name of whom a certificate is for: `C=GB,O=Example,CN=name`, in the certificate's order, as GnuTLS and so
/// QEMU write it (RFC 4514 has the same words in the opposite order).
pub fn distinguished_name(certificate: &[u8]) -> Option<String> {
    let certificate = x509_cert::Certificate::from_der(certificate).ok()?;
    let parts = certificate.tbs_certificate().subject().iter_rdn().map(ToString::to_string);
    Some(parts.collect::<Vec<String>>().join(","))
}

/// The distinguished name of the client at the other end, if it has shown a certificate.
pub fn peer_name(connection: &ServerConnection) -> Option<String> {
    connection.peer_certificates()?.first().and_then(|c| distinguished_name(c))
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

fn server(dir: &Path, verify: bool, password: Option<&Secret>) -> Result<ServerConfig, ObjectError> {
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
    let (chain, key) = identity(dir, "server", password)?;
    builder.with_single_cert(chain, key).map_err(|e| say(e.to_string()))
}

fn client(dir: &Path, password: Option<&Secret>) -> Result<ClientConfig, ObjectError> {
    let say = |e: String| bad(format!("{}: {e}", dir.display()));
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| say(e.to_string()))?
        .with_root_certificates(roots(dir)?);
    // A client without a certificate can speak to servers that do not ask for one.
    if !dir.join("client-cert.pem").exists() {
        return Ok(builder.with_no_client_auth());
    }
    let (chain, key) = identity(dir, "client", password)?;
    builder.with_client_auth_cert(chain, key).map_err(|e| say(e.to_string()))
}

impl TlsCreds {
    pub(crate) fn from_fields(fields: &mut Fields, objects: &Objects) -> Result<Self, ObjectError> {
        let dir = PathBuf::from(fields.text("dir")?.ok_or_else(|| bad("Parameter 'dir' is missing"))?);
        let verify = fields.flag("verify-peer")?.unwrap_or(true);
        if fields.text("priority")?.is_some() {
            return Err(bad("tls-creds-x509: 'priority' is not supported by this version"));
        }
        let password = fields.text("passwordid")?.map(|id| objects.password(&id)).transpose()?;
        let password = password.as_deref();
        // Certificates are checked as they are used, in any case.
        fields.flag("sanity-check")?;
        match fields.text("endpoint")?.as_deref() {
            Some("server") => Ok(Self(Endpoint::Server(Arc::new(server(&dir, verify, password)?)))),
            None | Some("client") if !verify => {
                Err(bad("tls-creds-x509: a client that does not verify its server is not supported"))
            }
            None | Some("client") => Ok(Self(Endpoint::Client(Arc::new(client(&dir, password)?)))),
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
