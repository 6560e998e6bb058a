//! What a D-Bus bus, and helpers on it, say when their state is asked for and given back.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;

use holdfast_dbus::Helpers;
use holdfast_objects::Objects;
use vmm_sys_util::tempdir::TempDir;

/// Longest input: it fits a socket's buffer.
const MAX: usize = 64 << 10;

/// The target: the bus's side of a connection.
pub fn run(data: &[u8]) {
    let data = data.get(..data.len().min(MAX)).unwrap_or_default().to_vec();
    let dir = TempDir::new().expect("a directory");
    let path = dir.as_path().join("s");
    let listener = UnixListener::bind(&path).expect("listening");
    let bus = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        // The client may hang up first.
        let _ = socket.write_all(&data);
        let _ = socket.shutdown(Shutdown::Write);
        let mut request = [0; 4096];
        while socket.read(&mut request).is_ok_and(|n| n != 0) {}
    });
    let objects = Objects::for_vm();
    objects.add_text(&format!("dbus-vmstate,id=v,addr=unix:path={}", path.display())).expect("an object");
    let object = objects.dbus_vmstate().expect("it is there");
    if let Ok(mut helpers) = Helpers::find(&object) {
        let ids: Vec<String> = helpers.ids().cloned().collect();
        // Errors are all that is asked for.
        let states = helpers.save().unwrap_or_default();
        for id in ids {
            let state = states.iter().find(|(other, _)| *other == id).map(|(_, state)| state.as_slice());
            let _ = helpers.load(&id, state.unwrap_or_default());
        }
    }
    bus.join().expect("no panic");
}
