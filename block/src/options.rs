//! The options of nodes: one tree for `--blockdev`, `blockdev-add`, `--image-opts` and `json:` file names.

use schemars::JsonSchema;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::BlockError;
use crate::nbd::Address;
pub use holdfast_objects::pairs::split_pairs;

/// Deepest nesting of option trees.
const MAX_DEPTH: usize = 32;

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// A file on the host.
    File,
    /// A block device of the host.
    HostDevice,
    /// An export of an NBD server.
    Nbd,
    /// A file of an HTTP server, for reading.
    Http,
    /// The same over TLS.
    Https,
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// LUKS version 1.
    Luks,
    /// A filter that keeps to the rates of a group.
    Throttle,
    /// VirtualBox's format.
    Vdi,
    /// Hyper-V's format.
    Vhdx,
    /// VMware's format.
    Vmdk,
    /// Virtual PC's format.
    Vpc,
}

impl Driver {
    /// All that there are.
    pub const ALL: [Self; 13] = [
        Self::File,
        Self::HostDevice,
        Self::Nbd,
        Self::Http,
        Self::Https,
        Self::Raw,
        Self::Qcow2,
        Self::Luks,
        Self::Throttle,
        Self::Vdi,
        Self::Vhdx,
        Self::Vmdk,
        Self::Vpc,
    ];

    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::HostDevice => "host_device",
            Self::Nbd => "nbd",
            Self::Http => "http",
            Self::Https => "https",
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
            Self::Throttle => "throttle",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Vpc => "vpc",
        }
    }

    /// The driver of that name.
    ///
    /// # Errors
    /// [`BlockError::Option`] for one that is not there.
    pub fn from_name(name: &str) -> Result<Self, BlockError> {
        let found = Self::ALL.into_iter().find(|d| d.name() == name);
        found.ok_or_else(|| BlockError::Option(format!("Unknown driver '{name}'")))
    }

    /// True if it is a format, which lies over a file.
    pub fn is_format(self) -> bool {
        !matches!(self, Self::File | Self::HostDevice | Self::Nbd | Self::Http | Self::Https)
    }

    /// True if the bytes come from a web server.
    pub fn is_web(self) -> bool {
        matches!(self, Self::Http | Self::Https)
    }
}

/// Page cache and flushes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CacheOptions {
    /// Bypass the host's page cache.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// Ignore flushes.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub no_flush: Option<bool>,
}

/// What becomes of discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiscardMode {
    /// Nothing.
    #[serde(alias = "off")]
    Ignore,
    /// Space is given back.
    #[serde(alias = "on")]
    Unmap,
}

/// What becomes of writes of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    /// They are writes.
    Off,
    /// They are stored as zeroes without data.
    On,
    /// They give space back, too.
    Unmap,
}

/// How a file's requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// By threads.
    Threads,
    /// By Linux AIO.
    Native,
    /// By io_uring.
    IoUring,
}

/// Locks against other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Locking {
    /// If the file system can.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// A node: by its options or, where it exists already, by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum NodeRef {
    /// None; for `backing` only.
    None,
    /// A node name.
    Name(String),
    /// A new node.
    Node(Box<BlockdevOptions>),
}

/// The kind of a socket's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SocketKind {
    /// TCP: `host` and `port`.
    Inet,
    /// UNIX: `path`.
    Unix,
}

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SocketAddress {
    /// The kind.
    #[serde(rename = "type")]
    pub kind: SocketKind,
    /// Name or address of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// The socket's path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// How an image's contents are encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EncryptOptions {
    /// `luks`; as the image says if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Id of the secret that is the password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret: Option<String>,
}

/// The options of a node. Which ones a driver takes is checked by [`BlockdevOptions::check`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevOptions {
    /// What it is; found out from the image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<Driver>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// It is not written.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// It is not written if it cannot be.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub auto_read_only: Option<bool>,
    /// Others may write it.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub force_share: Option<bool>,
    /// Page cache and flushes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheOptions>,
    /// What becomes of discards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard: Option<DiscardMode>,
    /// What becomes of writes of zeroes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detect_zeroes: Option<DetectZeroes>,
    /// Files: the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
    /// Files: how requests are carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aio: Option<Aio>,
    /// Files: locks against other processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locking: Option<Locking>,
    /// Formats: the node below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<NodeRef>,
    /// qcow2: the node that has what this one does not; the one that the image names if absent.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "nullable")]
    pub backing: Option<NodeRef>,
    /// qcow2: the external data file; the one that the image names if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<NodeRef>,
    /// NBD: where the server is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<SocketAddress>,
    /// NBD: short for `server.host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// NBD: short for `server.port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// NBD: short for `server.path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// NBD: the export; the default one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// NBD: id of the TLS credentials to use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_creds: Option<String>,
    /// NBD: the name that the server's certificate must have, if not that of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_hostname: Option<String>,
    /// NBD: how long requests wait for a lost connection, in seconds.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub reconnect_delay: Option<u64>,
    /// NBD: how long the first connection is tried for, in seconds.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub open_timeout: Option<u64>,
    /// NBD: the metadata context that block status is asked of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_dirty_bitmap: Option<String>,
    /// HTTP: where the file is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// HTTP: bytes that are read ahead.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub readahead: Option<u64>,
    /// HTTP: the server's certificate is verified.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub sslverify: Option<bool>,
    /// HTTP: how long a request may take, in seconds.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// HTTP: cookies, as `NAME=VALUE; …`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<String>,
    /// HTTP: id of the secret that has the cookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie_secret: Option<String>,
    /// HTTP: the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// HTTP: id of the secret that is the user's password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_secret: Option<String>,
    /// HTTP: the user of the proxy that the environment names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_username: Option<String>,
    /// HTTP: id of the secret that is that user's password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_password_secret: Option<String>,
    /// throttle: id of the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_group: Option<String>,
    /// LUKS: id of the secret that is the password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret: Option<String>,
    /// LUKS: the node that has the header, where it is detached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<NodeRef>,
    /// qcow2: how the image is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<EncryptOptions>,
    /// raw: where the disk starts in the file, in bytes.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// raw: size of the disk in bytes.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// qcow2: bytes of L2 tables in memory.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub l2_cache_size: Option<u64>,
    /// qcow2: bytes of refcount blocks in memory.
    #[serde(default, deserialize_with = "size", skip_serializing_if = "Option::is_none")]
    pub refcount_cache_size: Option<u64>,
    /// qcow2: pass discards of the guest on to the file.
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "Option::is_none")]
    pub pass_discard_request: Option<bool>,
}

fn nullable<'de, D: Deserializer<'de>>(d: D) -> Result<Option<NodeRef>, D::Error> {
    Option::<NodeRef>::deserialize(d).map(|n| Some(n.unwrap_or(NodeRef::None)))
}

/// A boolean, which key=value syntax writes as on or off.
fn flag<'de, D: Deserializer<'de>>(d: D) -> Result<Option<bool>, D::Error> {
    match Value::deserialize(d)? {
        Value::Bool(b) => Ok(Some(b)),
        Value::String(s) => match s.as_str() {
            "on" | "yes" | "true" | "y" => Ok(Some(true)),
            "off" | "no" | "false" | "n" => Ok(Some(false)),
            other => Err(de::Error::custom(format!("'{other}' is neither 'on' nor 'off'"))),
        },
        other => Err(de::Error::custom(format!("{other} is not a boolean"))),
    }
}

/// A number of bytes, which key=value syntax writes with suffixes.
fn size<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    match Value::deserialize(d)? {
        Value::Number(n) => {
            n.as_u64().map(Some).ok_or_else(|| de::Error::custom(format!("{n} is not a size")))
        }
        Value::String(s) => {
            parse_size(&s).map(Some).ok_or_else(|| de::Error::custom(format!("'{s}' is not a size")))
        }
        other => Err(de::Error::custom(format!("{other} is not a size"))),
    }
}

/// Bytes from a number with an optional binary suffix (`b`, `k`, `M`, `G`, `T`, `P`, `E`); fractions are allowed with a suffix.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(1 << shift),
        Some((whole, fraction)) if shift != 0 => {
            let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
            let digits = fraction.get(..fraction.len().min(15))?;
            let part = if digits.is_empty() { 0 } else { digits.parse::<u128>().ok()? };
            let scaled = (part << shift) / 10u128.pow(digits.len() as u32);
            whole.checked_mul(1 << shift)?.checked_add(u64::try_from(scaled).ok()?)
        }
        Some(_) => None,
    }
}

fn bad(text: impl Into<String>) -> BlockError {
    BlockError::Option(text.into())
}

fn insert(tree: &mut Map<String, Value>, key: &str, value: String, depth: usize) -> Result<(), BlockError> {
    if depth > MAX_DEPTH {
        return Err(bad("options are nested too deeply"));
    }
    match key.split_once('.') {
        None => {
            if tree.insert(key.to_owned(), Value::String(value)).is_some() {
                return Err(bad(format!("option '{key}' is given twice")));
            }
            Ok(())
        }
        Some((head, rest)) => {
            let below = tree.entry(head).or_insert_with(|| Value::Object(Map::new()));
            match below {
                Value::Object(map) => insert(map, rest, value, depth + 1),
                _ => Err(bad(format!("option '{head}' is both a value and a group"))),
            }
        }
    }
}

impl BlockdevOptions {
    /// The image in a file, of a format that is found out if it is not given.
    pub fn of_file(filename: &str, driver: Option<Driver>) -> Self {
        let file = Self { driver: None, filename: Some(filename.to_owned()), ..Self::default() };
        Self { driver, file: Some(NodeRef::Node(Box::new(file))), ..Self::default() }
    }

    /// Options as `driver=qcow2,file.filename=…`.
    ///
    /// # Errors
    /// [`BlockError::Option`] that names the key.
    pub fn from_pairs(text: &str) -> Result<Self, BlockError> {
        let mut tree = Map::new();
        for (key, value) in split_pairs(text) {
            let value = value.ok_or_else(|| bad(format!("Expected '=' after parameter '{key}'")))?;
            insert(&mut tree, &key, value, 0)?;
        }
        Self::from_value(Value::Object(tree))
    }

    /// Options as a JSON object; keys may be dotted.
    ///
    /// # Errors
    /// [`BlockError::Option`] that says what is wrong.
    pub fn from_value(mut value: Value) -> Result<Self, BlockError> {
        // An image named by `filename` alone, as `--image-opts driver=qcow2,filename=x`.
        if let Value::Object(map) = &mut value {
            let dotted: Vec<String> = map.keys().filter(|k| k.contains('.')).cloned().collect();
            for key in dotted {
                if let Some(Value::String(text)) = map.remove(&key) {
                    insert(map, &key, text, 0)?;
                }
            }
        }
        serde_json::from_value(value).map_err(|e| bad(e.to_string()))
    }

    /// Options behind `json:`.
    ///
    /// # Errors
    /// [`BlockError::Option`].
    pub fn from_json(text: &str) -> Result<Self, BlockError> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| bad(format!("Could not parse the JSON options: {e}")))?;
        Self::from_value(value)
    }

    /// Where an NBD server is.
    ///
    /// # Errors
    /// [`BlockError::Option`] if that is not said, or in two ways.
    pub fn address(&self) -> Result<Address, BlockError> {
        let tcp = |host: &Option<String>, port: &Option<String>| {
            let port = port.as_deref().unwrap_or("10809");
            let port = port.parse().map_err(|_| bad(format!("'{port}' is not a port number")))?;
            Ok(Address::Tcp(host.clone().unwrap_or_else(|| "localhost".to_owned()), port))
        };
        match (&self.server, &self.host, &self.path) {
            (Some(server), None, None) if self.port.is_none() => {
                match (server.kind, &server.path, &server.host) {
                    (SocketKind::Unix, Some(path), None) if server.port.is_none() => {
                        Ok(Address::Unix(path.into()))
                    }
                    (SocketKind::Inet, None, Some(_)) => tcp(&server.host, &server.port),
                    _ => Err(bad("'server' has 'host' and 'port' for type=inet, or 'path' for type=unix")),
                }
            }
            (None, None, Some(path)) if self.port.is_none() => Ok(Address::Unix(path.into())),
            (None, Some(_), None) => tcp(&self.host, &self.port),
            _ => Err(bad("NBD server address missing: one of 'server', 'host' and 'path' is needed")),
        }
    }

    /// Refuses options that the driver does not have.
    ///
    /// # Errors
    /// [`BlockError::Option`] that names the option.
    pub fn check(&self, driver: Driver) -> Result<(), BlockError> {
        let nbd = driver == Driver::Nbd;
        let web = driver.is_web();
        let is_file = !driver.is_format() && !nbd && !web;
        let foreign = [
            ("filename", self.filename.is_some(), is_file || (self.file.is_none() && !nbd && !web)),
            ("url", self.url.is_some(), web),
            ("readahead", self.readahead.is_some(), web),
            ("sslverify", self.sslverify.is_some(), web),
            ("timeout", self.timeout.is_some(), web),
            ("cookie", self.cookie.is_some(), web),
            ("cookie-secret", self.cookie_secret.is_some(), web),
            ("username", self.username.is_some(), web),
            ("password-secret", self.password_secret.is_some(), web),
            ("proxy-username", self.proxy_username.is_some(), web),
            ("proxy-password-secret", self.proxy_password_secret.is_some(), web),
            ("aio", self.aio.is_some(), is_file),
            ("locking", self.locking.is_some(), is_file),
            ("file", self.file.is_some(), driver.is_format()),
            ("backing", self.backing.is_some(), driver == Driver::Qcow2),
            ("data-file", self.data_file.is_some(), driver == Driver::Qcow2),
            ("server", self.server.is_some(), nbd),
            ("host", self.host.is_some(), nbd),
            ("port", self.port.is_some(), nbd),
            ("path", self.path.is_some(), nbd),
            ("export", self.export.is_some(), nbd),
            ("tls-creds", self.tls_creds.is_some(), nbd),
            ("tls-hostname", self.tls_hostname.is_some(), nbd),
            ("reconnect-delay", self.reconnect_delay.is_some(), nbd),
            ("open-timeout", self.open_timeout.is_some(), nbd),
            ("x-dirty-bitmap", self.x_dirty_bitmap.is_some(), nbd),
            ("throttle-group", self.throttle_group.is_some(), driver == Driver::Throttle),
            ("key-secret", self.key_secret.is_some(), driver == Driver::Luks),
            ("header", self.header.is_some(), driver == Driver::Luks),
            ("encrypt", self.encrypt.is_some(), driver == Driver::Qcow2),
            ("offset", self.offset.is_some(), driver == Driver::Raw),
            ("size", self.size.is_some(), driver == Driver::Raw),
            ("l2-cache-size", self.l2_cache_size.is_some(), driver == Driver::Qcow2),
            ("refcount-cache-size", self.refcount_cache_size.is_some(), driver == Driver::Qcow2),
            ("pass-discard-request", self.pass_discard_request.is_some(), driver == Driver::Qcow2),
        ];
        if let Some((name, ..)) = foreign.iter().find(|(_, given, fits)| *given && !fits) {
            return Err(bad(format!(
                "Block format '{}' does not support the option '{name}'",
                driver.name()
            )));
        }
        if self.detect_zeroes == Some(DetectZeroes::Unmap) && self.discard != Some(DiscardMode::Unmap) {
            return Err(bad(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        if self.auto_read_only == Some(true) && !is_file && !web {
            return Err(bad("'auto-read-only' is not supported by this version"));
        }
        let direct = self.cache.and_then(|c| c.direct).unwrap_or(false);
        match self.aio {
            Some(Aio::Native) if !direct => Err(bad(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            )),
            Some(Aio::Native) => Err(bad("aio=native was specified, but is not supported in this build.")),
            _ => Ok(()),
        }
    }
}
