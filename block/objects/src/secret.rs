//! `secret` objects.

use std::fmt;
use std::io::Read;

use aes::Aes256;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockModeDecrypt, KeyIvInit};
use zeroize::Zeroizing;

use crate::{Fields, ObjectError, Objects, bad};

/// Largest file that a secret is read from, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Bytes that nobody is to see. They are overwritten with zeroes in the end.
pub struct Secret(Zeroizing<Vec<u8>>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A secret made of what is there already.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }

    /// What is secret.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn from_fields(fields: &mut Fields, objects: &Objects) -> Result<Self, ObjectError> {
        let data = fields.text("data")?.map(|t| Zeroizing::new(t.into_bytes()));
        let file = fields.text("file")?;
        let base64 = match fields.text("format")?.as_deref() {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => return Err(bad(format!("Parameter 'format' does not accept value '{other}'"))),
        };
        let (keyid, iv) = (fields.text("keyid")?, fields.text("iv")?);
        let input = match (data, file) {
            (Some(_), Some(_)) => return Err(bad("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(bad("Either 'file' or 'data' must be provided")),
            (Some(data), None) => data,
            (None, Some(path)) => read_file(&path)?,
        };
        let input = if base64 { decode(&input, "data")? } else { input };
        match keyid {
            None if iv.is_some() => Err(bad("'iv' is of use with 'keyid' only")),
            None => Ok(Self(input)),
            Some(keyid) => {
                let iv = iv.ok_or_else(|| bad("IV is required to decrypt secret"))?;
                let key = objects.secret(&keyid)?;
                decrypt(input, &key, &decode(iv.as_bytes(), "iv")?).map(Self)
            }
        }
    }
}

fn read_file(path: &str) -> Result<Zeroizing<Vec<u8>>, ObjectError> {
    let fail = |source| ObjectError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(fail)?;
    // The whole size at once: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE as usize + 1));
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(bad(format!("{path}: a secret has at most {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

fn decode(text: &[u8], what: &str) -> Result<Zeroizing<Vec<u8>>, ObjectError> {
    let packed: Zeroizing<Vec<u8>> =
        Zeroizing::new(text.iter().copied().filter(|c| !matches!(c, b'\n' | b'\r')).collect());
    let decoded = STANDARD.decode(&*packed);
    // Not the decoder's message: it quotes what it was given.
    decoded.map(Zeroizing::new).map_err(|_| bad(format!("Base64 data of '{what}' is not valid")))
}

/// AES-256 in CBC mode, padded as PKCS #7 says.
fn decrypt(
    mut input: Zeroizing<Vec<u8>>,
    key: &Secret,
    iv: &[u8],
) -> Result<Zeroizing<Vec<u8>>, ObjectError> {
    if key.bytes().len() != 32 {
        return Err(bad("Key should be 32 bytes in length"));
    }
    if iv.len() != 16 {
        return Err(bad(format!("IV should be 16 bytes in length not {}", iv.len())));
    }
    let cipher = cbc::Decryptor::<Aes256>::new_from_slices(key.bytes(), iv)
        .map_err(|_| bad("Key should be 32 bytes in length"))?;
    let plain = cipher.decrypt_padded::<Pkcs7>(&mut input).map(<[u8]>::len);
    let len = plain.map_err(|_| bad("the encrypted secret is damaged, or its key or IV is another one"))?;
    input.truncate(len);
    Ok(input)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(texts: &[&str]) -> Result<Objects, ObjectError> {
        let objects = Objects::default();
        texts.iter().try_for_each(|t| objects.add_text(t)).map(|()| objects)
    }

    fn value(texts: &[&str]) -> Vec<u8> {
        let objects = objects(texts).expect("objects");
        objects.secret("s").expect("secret").bytes().to_vec()
    }

    #[test]
    fn texts_files_and_base64() {
        assert_eq!(value(&["secret,id=s,data=a,,b"]), b"a,b");
        assert_eq!(value(&["secret,id=s,data=bGV0bWVpbg==,format=base64"]), b"letmein");
        assert_eq!(value(&[r#"{"qom-type":"secret","id":"s","data":"x"}"#]), b"x");
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), "from a file\n").expect("written");
        assert_eq!(value(&[&format!("secret,id=s,file={}", file.path().display())]), b"from a file\n");
    }

    #[test]
    fn openssl_encrypts_what_is_decrypted_here() {
        // openssl enc -aes-256-cbc -K 000102…1f -iv 000102…0f -base64, of "letmein"
        let key = STANDARD.encode((0..32).collect::<Vec<u8>>());
        let iv = STANDARD.encode((0..16).collect::<Vec<u8>>());
        let master = format!("secret,id=master,data={key},format=base64");
        let text = |data: &str| format!("secret,id=s,keyid=master,iv={iv},format=base64,data={data}");
        let sealed = std::process::Command::new("sh")
            .args(["-c", "printf letmein | openssl enc -aes-256-cbc -base64 -K \
                000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f -iv 000102030405060708090a0b0c0d0e0f"])
            .output()
            .expect("openssl is needed for this test");
        let sealed = String::from_utf8(sealed.stdout).expect("text");
        assert_eq!(value(&[&master, &text(sealed.trim())]), b"letmein");
        // Another key does not decrypt it.
        let wrong = format!("secret,id=master,data={},format=base64", STANDARD.encode([7; 32]));
        assert!(objects(&[&wrong, &text(sealed.trim())]).is_err());
        let short = "secret,id=master,data=short";
        let error = objects(&[short, &text(sealed.trim())]).expect_err("short key").to_string();
        assert_eq!(error, "Key should be 32 bytes in length");
    }

    #[test]
    fn what_is_wrong_is_said_and_nothing_secret_shown() {
        let say = |text: &str| objects(&[text]).expect_err("refused").to_string();
        assert_eq!(say("secret,id=s"), "Either 'file' or 'data' must be provided");
        assert_eq!(say("secret,id=s,data=a,file=b"), "'file' and 'data' are mutually exclusive");
        assert_eq!(say("secret,data=a"), "Parameter 'id' is missing");
        assert!(say("secret,id=s,data=a,nonsense=1").contains("nonsense"));
        assert!(say("tls-nonsense,id=s").contains("tls-nonsense"));
        assert!(say("secret,id=s,file=/nonexistent/x").contains("/nonexistent/x"));
        assert!(!say("secret,id=s,data=hush!,format=base64").contains("hush"));
        assert!(!say(r#"{"qom-type":"secret","data":"hush"#).contains("hush"));
        let objects = objects(&["secret,id=s,data=hush"]).expect("objects");
        assert!(
            !format!("{objects:?}").contains("hush")
                && !format!("{:?}", objects.secret("s")).contains("hush")
        );
        assert!(objects.add_text("secret,id=s,data=again").is_err());
        objects.remove("s").expect("removed");
        assert!(objects.secret("s").is_err());
    }
}
