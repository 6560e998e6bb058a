//! The REST server as its strictest clients see it: bytes in, bytes out.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use holdfast_api::cli::Endpoint;
use holdfast_api::serve::{ApiThread, Listeners};
use holdfast_threads::PlainSpawner;
use holdfast_vmm::control::{ControlHandle, Origin, VmmShutdown, control};
use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

struct Server {
    path: PathBuf,
    handle: ControlHandle,
    api: Option<ApiThread>,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let (handle, inbox) = control().unwrap();
        std::thread::spawn(move || common::FakeManager::default().serve(&inbox));
        let listeners = Listeners::bind(Some(&Endpoint::Path(path.clone())), None, None).unwrap();
        let api = ApiThread::start(&PlainSpawner, handle.clone(), listeners).unwrap();
        Self { path, handle, api: Some(api), _directory: directory }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn raw(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }

    fn put(&self, route: &str, body: Option<Value>) -> (u16, Value) {
        let head = format!("PUT /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        let request = match body {
            None => format!("{head}\r\n"),
            Some(body) => {
                let body = body.to_string();
                format!(
                    "{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                )
            }
        };
        parse(&self.raw(&request))
    }

    fn get(&self, route: &str) -> (u16, Value) {
        parse(&self.raw(&format!("GET /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\n\r\n")))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.api.take().unwrap().stop();
        let _ = self.handle.call(VmmShutdown(Origin::HostQuit));
        assert!(!self.path.exists(), "the socket goes with the server");
    }
}

/// Reads a response the way `ch-remote` does: the status is all that stands between the version and the
/// line's end, the length follows the exact text `Content-Length: `.
fn parse(response: &str) -> (u16, Value) {
    let status = response.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.split_once('\r')).unwrap().0;
    let status = status.trim().parse().unwrap_or_else(|_| panic!("status with a reason: {response}"));
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let length =
        head.split_once("Content-Length: ").map(|(_, rest)| rest.split_once('\r').unwrap_or((rest, "")).0);
    assert_eq!(length.map_or(0, |length| length.parse().unwrap()), body.len(), "{response}");
    (status, if body.is_empty() { Value::Null } else { serde_json::from_str(body).unwrap() })
}

fn kernel() -> Option<Value> {
    Some(json!({ "payload": { "kernel": "/k" }, "console": { "mode": "Off" } }))
}

#[test]
fn responses_to_the_byte() {
    let server = Server::start();
    let expected = "HTTP/1.1 404 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
                    Content-Type: application/json\r\nContent-Length: 13\r\n\r\n[\"Not Found\"]";
    assert_eq!(server.raw("GET /api/v1/nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"), expected);
    let expected = "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(server.raw("PUT /api/v1/vm.delete HTTP/1.1\r\nHost: localhost\r\n\r\n"), expected);
}

#[test]
fn a_life_cycle_with_cloud_hypervisors_statuses() {
    let server = Server::start();
    let put = |route: &str| server.put(route, None);
    let (status, ping) = server.get("vmm.ping");
    assert_eq!(status, 200);
    assert_eq!(ping["pid"], std::process::id());
    assert!(ping["version"].is_string() && ping["features"].is_array());
    assert_eq!(server.get("vm.info").0, 404);
    assert_eq!(server.get("vm.counters").0, 500);
    assert_eq!(put("vm.delete"), (204, Value::Null));
    let not_created = json!(["Error from API", "The VM could not boot", "VM is not created"]);
    assert_eq!(put("vm.boot"), (404, not_created));
    assert_eq!(server.put("vm.create", Some(json!({ "payload": {} }))).0, 204);
    assert_eq!(put("vm.boot").0, 400);
    assert_eq!(put("vm.delete").0, 204);
    assert_eq!(server.put("vm.create", kernel()).0, 204);
    assert_eq!(server.put("vm.create", kernel()).0, 500);
    assert_eq!(server.get("vm.info").1["state"], "Created");
    assert_eq!(server.put("vm.add-disk", Some(json!({ "path": "/d" }))), (204, Value::Null));
    assert_eq!(put("vm.boot"), (204, Value::Null));
    let (_, info) = server.get("vm.info");
    assert_eq!(info["state"], "Running");
    assert_eq!(info["config"]["disks"][0]["id"], "_disk0");
    let added = server.put("vm.add-disk", Some(json!({ "path": "/e" })));
    assert_eq!(added, (200, json!({ "id": "_disk1", "bdf": "0000:00:05.0" })));
    assert_eq!(server.put("vm.add-disk", Some(json!({ "path": "/f", "id": "_disk1" }))).0, 409);
    assert_eq!(server.put("vm.add-disk", Some(json!({ "path": "/f", "id": "__x" }))).0, 400);
    assert_eq!(server.put("vm.remove-device", Some(json!({ "id": "none" }))).0, 404);
    assert_eq!(server.put("vm.remove-device", Some(json!({ "id": "_disk1" }))).0, 204);
    assert_eq!(put("vm.pause").0, 204);
    assert_eq!(put("vm.pause").0, 500, "paused twice is 500, never 405");
    assert_eq!(put("vm.resume").0, 204);
    assert_eq!(server.put("vm.resize", Some(json!({ "desired_balloon": 4096 }))).0, 204);
    assert_eq!(server.put("vm.resize", Some(json!({ "desired_vcpus": 1 }))).0, 429);
    for route in ["vm.reboot", "vm.power-button", "vm.nmi", "vm.shutdown"] {
        assert_eq!(put(route), (204, Value::Null), "{route}");
    }
    assert_eq!(server.get("vm.info").1["state"], "Created");
    assert_eq!(put("vmm.shutdown"), (200, Value::Null));
}

#[test]
fn what_is_wrong_is_said() {
    let server = Server::start();
    let first = |answer: (u16, Value)| (answer.0, answer.1[0].as_str().unwrap_or_default().to_owned());
    assert_eq!(first(server.get("vm.boot")), (400, "Bad Request".to_owned()));
    assert_eq!(first(server.put("vm.info", None)), (400, "Bad Request".to_owned()));
    assert_eq!(first(server.put("vm.boot", Some(json!({})))), (400, "Bad Request".to_owned()));
    assert_eq!(first(server.put("vm.create", None)), (400, "Bad Request".to_owned()));
    let post = server.raw("POST /api/v1/vm.boot HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(parse(&post).0, 400);
    let (status, body) = server.put("vm.create", Some(json!({ "cpus": { "boot_vcpus": "x" } })));
    assert_eq!((status, &body[0]), (400, &json!("Failed to deserialize JSON")));
    assert!(body[1].as_str().unwrap().contains("cpus.boot_vcpus"), "{body}");
    let (status, body) =
        server.put("vm.create", Some(json!({ "pmem": [{ "file": "t" }], "watchdog": true })));
    assert_eq!(status, 400);
    let text = body.to_string();
    assert!(text.contains("`pmem`") && text.contains("`watchdog`"), "{text}");
    let (status, body) = server.put("vm.add-pmem", Some(json!({ "file": "t" })));
    assert_eq!(status, 500);
    assert_eq!(body, json!(["Error from API", "vm.add-pmem is not supported by this version"]));
    let lenient = json!({ "payload": { "kernel": "/k", "later": 1 }, "later": {} });
    assert_eq!(server.put("vm.create", Some(lenient)).0, 204);
}

#[test]
fn a_body_may_have_four_mebibytes() {
    let server = Server::start();
    let padded = |len: usize| {
        let filler = " ".repeat(len - 2);
        format!("PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n{{{filler}}}")
    };
    assert_eq!(parse(&server.raw(&padded(4 << 20))).0, 204);
    let mut stream = server.connect();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(padded((4 << 20) + 1).as_bytes());
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response);
    assert!(response.starts_with(b"HTTP/1.1 413 \r\n"), "{}", String::from_utf8_lossy(&response));
}

#[test]
fn file_descriptors_belong_to_their_request() {
    let server = Server::start();
    assert_eq!(server.put("vm.create", kernel()).0, 204);
    let files: Vec<_> = (0..4).map(|_| tempfile::tempfile().unwrap()).collect();
    let request = |id: &str, queues: usize| {
        // The numbers in the body mean nothing.
        let body = json!({ "id": id, "num_queues": queues, "fds": [77] }).to_string();
        let head = "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        (format!("{head}Content-Length: {}\r\n\r\n", body.len()), body)
    };
    // ch-remote: descriptors go with the first bytes, the body follows. libvirt: all in one message,
    // and one connection for several requests.
    let mut stream = server.connect();
    let (head, body) = request("a", 4);
    stream.send_with_fds(&[head.as_bytes()], &[files[0].as_raw_fd(), files[1].as_raw_fd()]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    stream.write_all(body.as_bytes()).unwrap();
    expect(&mut stream, "204");
    let (head, body) = request("b", 2);
    let whole = format!("{head}{body}");
    stream.send_with_fds(&[whole.as_bytes()], &[files[2].as_raw_fd()]).unwrap();
    expect(&mut stream, "204");
    let (head, body) = request("c", 4);
    stream.send_with_fds(&[format!("{head}{body}").as_bytes()], &[files[3].as_raw_fd()]).unwrap();
    expect(&mut stream, "400");
    let get = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.send_with_fds(&[get.as_bytes()], &[files[3].as_raw_fd()]).unwrap();
    expect(&mut stream, "400");
    stream.write_all(get.as_bytes()).unwrap();
    expect(&mut stream, "200");
    assert_eq!(server.put("vm.boot", None).0, 204);
    let (_, counters) = server.get("vm.counters");
    let inodes = |id: &str| {
        let mut inodes: Vec<u64> =
            counters[id].as_object().unwrap().values().map(|value| value.as_u64().unwrap()).collect();
        inodes.sort_unstable();
        inodes
    };
    let mut first = vec![common::inode(&files[0]), common::inode(&files[1])];
    first.sort_unstable();
    assert_eq!(inodes("a"), first);
    assert_eq!(inodes("b"), [common::inode(&files[2])]);
}

fn expect(stream: &mut UnixStream, status: &str) {
    let mut buffer = [0_u8; 1024];
    let count = stream.read(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..count]);
    assert!(text.starts_with(&format!("HTTP/1.1 {status} \r\n")), "{text}");
}

#[test]
fn restore_counts_its_file_descriptors() {
    let server = Server::start();
    let body = json!({ "source_url": "file:///s", "net_fds": [{ "id": "n", "num_fds": 2 }] }).to_string();
    let file = tempfile::tempfile().unwrap();
    let request =
        format!("PUT /api/v1/vm.restore HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut stream = server.connect();
    stream.send_with_fds(&[request.as_bytes()], &[file.as_raw_fd()]).unwrap();
    expect(&mut stream, "400");
    stream.send_with_fds(&[request.as_bytes()], &[file.as_raw_fd(), file.as_raw_fd()]).unwrap();
    expect(&mut stream, "204");
    assert_eq!(server.get("vm.info").1["state"], "Paused");
}

#[test]
fn a_connection_is_kept_when_a_request_with_a_body_is_refused() {
    let server = Server::start();
    let mut stream = server.connect();
    let body = vec![b' '; 1 << 20];
    for route in ["QUERY /api/v1/vm.add-net", "PUT /api/v1/nowhere"] {
        let head = format!("{route} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).unwrap();
        expect(&mut stream, if route.starts_with("QUERY") { "400" } else { "404" });
    }
    stream.write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    expect(&mut stream, "200");
}

#[test]
fn a_long_operation_blocks_nobody() {
    let server = Server::start();
    assert_eq!(server.put("vm.create", kernel()).0, 204);
    assert_eq!(server.put("vm.boot", None).0, 204);
    assert_eq!(server.put("vm.pause", None).0, 204);
    let destination = tempfile::tempdir().unwrap();
    let hold = destination.path().join(common::HOLD);
    std::fs::write(&hold, "").unwrap();
    let url = format!("file://{}", destination.path().display());
    std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| server.put("vm.snapshot", Some(json!({ "destination_url": url }))));
        assert_eq!(server.get("vm.info").0, 200);
        assert!(!snapshot.is_finished(), "vm.info waited for vm.snapshot");
        std::fs::remove_file(&hold).unwrap();
        assert_eq!(snapshot.join().unwrap().0, 204);
    });
}

#[test]
fn a_socket_in_use_is_not_taken_and_a_stale_one_is() {
    let server = Server::start();
    let endpoint = Endpoint::Path(server.path.clone());
    let error = Listeners::bind(Some(&endpoint), None, None).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    assert_eq!(server.get("vmm.ping").0, 200);
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    drop(Listeners::bind(Some(&Endpoint::Path(stale.clone())), None, None).unwrap());
    assert!(!stale.exists());
}
