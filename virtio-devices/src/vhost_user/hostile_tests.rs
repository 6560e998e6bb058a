//! Every kind of front end against back ends that are broken or mean.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use holdfast_device::BuildError;

use super::fs::config::FsConfig;
use super::generic::config::GenericVhostUserConfig;
use crate::blk::config::DiskConfig;
use crate::net::config::NetConfig;
use crate::testing::shared_context;
use crate::vsock::config::VsockConfig;

/// Why a front end of this kind is not built.
fn refusal(kind: &str, socket: &Path) -> String {
    let (context, path) = (shared_context(), socket.to_owned());
    let vhost_socket = Some(socket.display().to_string());
    let built = match kind {
        "fs" => super::fs::build("d", &FsConfig::new("tag".into(), path), &context),
        "generic" => super::generic::build("d", &GenericVhostUserConfig::new(40, vec![64], path), &context),
        "vsock" => {
            let config = VsockConfig { vhost_user: true, ..VsockConfig::new(3, path) };
            super::vsock::build("d", &config, &context)
        }
        "net" => {
            let config = NetConfig { vhost_user: true, vhost_socket, ..NetConfig::default() };
            super::net::build("d", &config, &context)
        }
        _ => {
            let config = DiskConfig { vhost_user: true, vhost_socket, ..DiskConfig::default() };
            super::blk::build("d", &config, &context)
        }
    };
    let error: BuildError = built.expect_err("refused");
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

const GET_FEATURES: u32 = 1;
const REPLY: u32 = 1 | 1 << 2;

fn message(request: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = [request, REPLY, size].iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(body);
    bytes
}

/// What a back end does with a connection. An end of the other side is the end of it.
type Manner = fn(&mut UnixStream);

fn silent(stream: &mut UnixStream) {
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Answers every message with these bytes.
fn answers(stream: &mut UnixStream, bytes: &[u8]) {
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).is_ok_and(|n| n != 0) && stream.write_all(bytes).is_ok() {}
}

const MANNERS: [(&str, Manner); 7] = [
    ("says nothing", silent),
    ("goes away", |_| {}),
    ("says anything", |stream| answers(stream, &[0xa5; 64])),
    ("answers half", |stream| {
        let half = message(GET_FEATURES, 8, &[0; 3]);
        let _ = stream.write_all(&half);
        silent(stream);
    }),
    ("answers more than was asked", |stream| answers(stream, &message(GET_FEATURES, 4096, &[0; 4096]))),
    ("answers another question", |stream| answers(stream, &message(24, 8, &[0xff; 8]))),
    ("is too old", |stream| answers(stream, &message(GET_FEATURES, 8, &[0; 8]))),
];

#[test]
fn every_front_end_refuses_every_broken_back_end_in_time() {
    let dir = tempfile::tempdir().expect("dir");
    let (tell, told) = channel();
    let mut waiting = 0;
    for kind in ["blk", "net", "fs", "vsock", "generic"] {
        for (number, (what, manner)) in MANNERS.iter().enumerate() {
            let (socket, tell) = (dir.path().join(format!("{kind}{number}")), tell.clone());
            let listener = UnixListener::bind(&socket).expect("binds");
            std::thread::spawn(move || {
                if let Ok((mut stream, _)) = listener.accept() {
                    manner(&mut stream);
                }
            });
            std::thread::spawn(move || {
                let refused = refusal(kind, &socket);
                tell.send((kind, what, refused)).expect("somebody waits");
            });
            waiting += 1;
        }
    }
    for _ in 0..waiting {
        let (kind, what, refused) = told.recv_timeout(Duration::from_secs(120)).expect("nothing hangs");
        let named = refused.contains("the back end") || refused.contains("vhost-user back end");
        assert!(named, "{kind}, a back end that {what}: {refused}");
        if *what == "is too old" {
            assert!(refused.contains("lacks virtio 1"), "{kind}: {refused}");
        }
    }
}
