//! Where a VM migrates to, or comes from.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use crate::MigrationError;

/// An address of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`.
    Tcp(String, u16),
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `file:PATH`: the VM is stored in one file, to go on later.
    File(PathBuf),
    /// `fd:N`: a connected socket that was inherited.
    Fd(RawFd),
}

const NONE: &str = "it is none of tcp:HOST:PORT, unix:PATH, fd:N, file:PATH";

impl FromStr for Address {
    type Err = MigrationError;

    fn from_str(text: &str) -> Result<Self, MigrationError> {
        let wrong =
            |reason: &str| MigrationError::Address { address: text.to_owned(), reason: reason.to_owned() };
        let (kind, rest) = text.split_once(':').ok_or_else(|| wrong(NONE))?;
        match kind {
            "tcp" => {
                let rest = rest.strip_prefix("//").unwrap_or(rest);
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| wrong("there is no port"))?;
                let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
                if host.is_empty() {
                    return Err(wrong("there is no host"));
                }
                let port = port.parse().map_err(|_| wrong("the port is no number up to 65535"))?;
                Ok(Self::Tcp(host.to_owned(), port))
            }
            "unix" if rest.is_empty() => Err(wrong("there is no path")),
            "unix" => Ok(Self::Unix(rest.strip_prefix("//").unwrap_or(rest).into())),
            "fd" => match rest.parse() {
                Ok(fd) if fd > 2 => Ok(Self::Fd(fd)),
                _ => Err(wrong("fd: takes the number, above 2, of an inherited file descriptor")),
            },
            "file" if rest.contains(",offset=") => {
                Err(wrong("an offset within the file is not supported by this version of Holdfast"))
            }
            "file" => match rest.strip_prefix("//").unwrap_or(rest) {
                "" => Err(wrong("there is no path")),
                path => Ok(Self::File(path.into())),
            },
            "exec" | "rdma" | "vsock" => {
                Err(wrong(&format!("`{kind}:` is not supported by this version of Holdfast")))
            }
            _ => Err(wrong(NONE)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in ["tcp:10.0.0.1:4444", "tcp:[::1]:1", "unix:/run/m", "fd:7", "file:/a/b"] {
            assert_eq!(text.parse::<Address>().expect("good").to_string(), text);
        }
        assert_eq!("tcp:h:1".parse::<Address>().expect("good"), Address::Tcp("h".into(), 1));
        for text in [
            "",
            "tcp:1",
            "tcp::1",
            "tcp:h:99999",
            "unix:",
            "fd:0",
            "fd:x",
            "http://x",
            "file:",
            "file:/a,offset=0x1000",
        ] {
            text.parse::<Address>().expect_err(text);
        }
        let exec = "exec:cat".parse::<Address>().expect_err("refused").to_string();
        assert!(exec.contains("`exec:` is not supported"), "{exec}");
    }
}
