//! Private keys in PEM files: as they are, or encrypted ones of PKCS #8.

use std::path::Path;

use pkcs8::der::asn1::OctetStringRef;
use pkcs8::der::{Decode, Encode};
use pkcs8::{ObjectIdentifier, PrivateKeyInfoRef};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer};
use sec1::{EcParameters, EcPrivateKey};
use zeroize::Zeroizing;

use crate::tls::read;
use crate::{ObjectError, Secret, bad};

const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
/// Curves, and the bytes of their private keys.
const CURVES: [(ObjectIdentifier, usize); 2] = [
    (ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7"), 32),
    (ObjectIdentifier::new_unwrap("1.3.132.0.34"), 48),
];

/// An elliptic curve's key with its number as long as the curve's are: GnuTLS writes them as numbers are, with a zero before
/// them or without those that they begin with, and others insist. `None` if it is right or of another curve.
fn right_length(der: &[u8], curve: Option<ObjectIdentifier>) -> Option<Zeroizing<Vec<u8>>> {
    let key = EcPrivateKey::from_der(der).ok()?;
    let named = key.parameters.map(|EcParameters::NamedCurve(curve)| curve);
    let curve = curve.or(named)?;
    let (_, len) = CURVES.into_iter().find(|(id, _)| *id == curve)?;
    if key.private_key.len() == len {
        return None;
    }
    let first = key.private_key.iter().position(|b| *b != 0)?;
    let digits = key.private_key.get(first..)?;
    let mut number = Zeroizing::new(vec![0; len.checked_sub(digits.len())?]);
    number.extend_from_slice(digits);
    let key = EcPrivateKey { private_key: &number, ..key };
    key.to_der().ok().map(Zeroizing::new)
}

fn right_length_pkcs8(der: &[u8]) -> Option<Vec<u8>> {
    let info = PrivateKeyInfoRef::try_from(der).ok().filter(|i| i.algorithm.oid == EC)?;
    let curve = info.algorithm.parameters.and_then(|p| p.decode_as().ok());
    let key = right_length(info.private_key.as_bytes(), curve)?;
    PrivateKeyInfoRef::new(info.algorithm, OctetStringRef::new(&key).ok()?).to_der().ok()
}

fn tidy(key: PrivateKeyDer<'static>) -> PrivateKeyDer<'static> {
    match &key {
        PrivateKeyDer::Sec1(sec1) => match right_length(sec1.secret_sec1_der(), None) {
            Some(der) => PrivateSec1KeyDer::from(der.to_vec()).into(),
            None => key,
        },
        PrivateKeyDer::Pkcs8(pkcs8) => match right_length_pkcs8(pkcs8.secret_pkcs8_der()) {
            Some(der) => PrivatePkcs8KeyDer::from(der).into(),
            None => key,
        },
        _ => key,
    }
}

/// The key of a PEM file, which is decrypted if there is a password for it.
pub(crate) fn private_key(
    path: &Path,
    password: Option<&Secret>,
) -> Result<PrivateKeyDer<'static>, ObjectError> {
    let bytes = Zeroizing::new(read(path)?);
    let shown = path.display();
    let text = std::str::from_utf8(&bytes).unwrap_or_default();
    if text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(bad(format!(
            "{shown}: the key is encrypted in a format of old; `openssl pkcs8 -topk8` makes one of PKCS #8"
        )));
    }
    let (start, end) = ("-----BEGIN ENCRYPTED PRIVATE KEY-----", "-----END ENCRYPTED PRIVATE KEY-----");
    let found = text.find(start).and_then(|at| text.get(at..));
    let Some(pem) = found.and_then(|rest| rest.get(..rest.find(end)? + end.len())) else {
        let key = PrivateKeyDer::from_pem_slice(&bytes);
        return key.map(tidy).map_err(|_| bad(format!("{shown}: there is no private key in PEM format")));
    };
    let Some(password) = password else {
        return Err(bad(format!(
            "{shown}: the private key is encrypted: 'passwordid' names the secret that opens it"
        )));
    };
    let (_, document) = pkcs8::SecretDocument::from_pem(pem)
        .map_err(|_| bad(format!("{shown}: there is no private key in PEM format")))?;
    let encrypted = pkcs8::EncryptedPrivateKeyInfoRef::try_from(document.as_bytes())
        .map_err(|_| bad(format!("{shown}: the private key is encrypted in a way that is not supported")))?;
    let key = encrypted.decrypt(password.bytes()).map_err(|_| {
        bad(format!(
            "{shown}: the password does not open the private key, or its encryption is not supported"
        ))
    })?;
    Ok(tidy(PrivatePkcs8KeyDer::from(key.as_bytes().to_vec()).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_curves_get_the_length_that_they_should_have() {
        let (curve, len) = CURVES[0];
        let make = |number: &[u8]| {
            let parameters = Some(EcParameters::NamedCurve(curve));
            EcPrivateKey { private_key: number, parameters, public_key: Some(&[4; 65]) }
                .to_der()
                .expect("DER")
        };
        let mut right = vec![0x81; len];
        assert!(right_length(&make(&right), None).is_none());
        let mut long = vec![0];
        long.extend_from_slice(&right);
        assert_eq!(*right_length(&make(&long), None).expect("shorter"), make(&right));
        assert_eq!(*right_length(&make(&long), Some(curve)).expect("shorter"), make(&right));
        right[0] = 0;
        assert_eq!(*right_length(&make(&right[1..]), None).expect("longer"), make(&right));
        // Too long for the curve, of another curve, or no key at all.
        assert!(right_length(&make(&[1; 40]), None).is_none());
        assert!(right_length(&make(&long), Some(EC)).is_none());
        assert!(right_length(b"nonsense", Some(curve)).is_none());
    }
}
