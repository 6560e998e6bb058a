//! The QMP server over its sockets.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use holdfast_api::cli::QmpAddress;
use holdfast_api::serve::{ApiThread, Listeners};
use holdfast_config::{PayloadConfig, VmConfig};
use holdfast_threads::PlainSpawner;
use holdfast_vmm::control::{Boot, ControlHandle, Create, Origin, VmmShutdown, control};
use serde_json::{Value, json};

struct Server {
    path: std::path::PathBuf,
    handle: ControlHandle,
    api: Option<ApiThread>,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let (handle, inbox) = control().unwrap();
        std::thread::spawn(move || common::FakeManager::default().serve(&inbox));
        let listeners = Listeners::bind(None, Some(&QmpAddress::Unix(path.clone())), None).unwrap();
        let api = ApiThread::start(&PlainSpawner, handle.clone(), listeners).unwrap();
        Self { path, handle, api: Some(api), _directory: directory }
    }

    fn create(&self) {
        let payload = Some(PayloadConfig { kernel: Some("/k".into()), ..PayloadConfig::default() });
        let name = Some("guest".to_owned());
        self.handle.call(Create(Box::new(VmConfig { payload, name, ..VmConfig::default() }))).unwrap();
    }

    fn client(&self) -> Client<UnixStream> {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Client { writer: stream.try_clone().unwrap(), reader: BufReader::new(stream) }
    }

    fn negotiated(&self) -> Client<UnixStream> {
        let mut client = self.client();
        client.receive();
        assert_eq!(client.ask(json!({ "execute": "qmp_capabilities" })), json!({ "return": {} }));
        client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.handle.call(VmmShutdown(Origin::HostQuit));
        self.api.take().unwrap().stop();
    }
}

struct Client<S: Read> {
    writer: S,
    reader: BufReader<S>,
}

impl<S: Read + Write> Client<S> {
    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    fn send(&mut self, text: &str) {
        self.writer.write_all(text.as_bytes()).unwrap();
    }

    fn ask(&mut self, request: Value) -> Value {
        self.send(&request.to_string());
        self.receive()
    }

    fn run(&mut self, command: &str) -> Value {
        let reply = self.ask(json!({ "execute": command }));
        reply.get("return").unwrap_or_else(|| panic!("{command}: {reply}")).clone()
    }

    fn error(&mut self, request: Value) -> (String, String) {
        let reply = self.ask(request);
        let text = |name: &str| reply["error"][name].as_str().unwrap_or_default().to_owned();
        (text("class"), text("desc"))
    }
}

#[test]
fn greeting_and_negotiation() {
    let server = Server::start();
    let mut client = server.client();
    let greeting = client.receive();
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    let (class, description) = client.error(json!({ "execute": "query-status" }));
    assert_eq!(class, "CommandNotFound");
    assert_eq!(description, "Expecting capabilities negotiation with 'qmp_capabilities'");
    let other = json!({ "execute": "qmp_capabilities", "arguments": { "enable": ["time-travel"] } });
    assert_eq!(client.error(other).1, "Parameter 'enable' does not accept value 'time-travel'");
    let reply = client.ask(json!({ "execute": "qmp_capabilities", "id": { "n": 1 } }));
    assert_eq!(reply, json!({ "return": {}, "id": { "n": 1 } }));
    assert_eq!(client.error(json!({ "execute": "qmp_capabilities" })).0, "CommandNotFound");
}

#[test]
fn out_of_band_requests_are_for_those_who_enabled_them_and_overtake() {
    let server = Server::start();
    let mut client = server.negotiated();
    let unexpected = client.error(json!({ "exec-oob": "query-status" }));
    assert_eq!(unexpected.1, "QMP input member 'exec-oob' is unexpected");
    let mut client = server.client();
    client.receive();
    let enable = json!({ "execute": "qmp_capabilities", "arguments": { "enable": ["oob"] } });
    assert_eq!(client.ask(enable), json!({ "return": {} }));
    let refused = client.error(json!({ "exec-oob": "query-status", "id": 1 }));
    assert_eq!(refused.1, "The command query-status does not support OOB");
    assert_eq!(client.error(json!({ "exec-oob": "no-such" })).0, "CommandNotFound");
    let both = client.error(json!({ "exec-oob": "query-status", "execute": "query-status" }));
    assert_eq!(both.1, "QMP input member 'exec-oob' clashes with 'execute'");
    // In one packet: the out-of-band request is answered before the requests that came first.
    let requests = [
        json!({ "execute": "query-version", "id": "a" }),
        json!({ "execute": "query-status", "id": "b" }),
        json!({ "exec-oob": "stop", "id": "c" }),
    ];
    client.send(&requests.map(|r| r.to_string()).join(""));
    let ids: Vec<Value> = (0..3).map(|_| client.receive()["id"].clone()).collect();
    assert_eq!(ids, ["c", "a", "b"]);
}

#[test]
fn errors_have_qemus_classes_and_words() {
    let server = Server::start();
    let mut client = server.negotiated();
    let generic = |text: &str| ("GenericError".to_owned(), text.to_owned());
    let missing = client.error(json!({ "execute": "nonsense" }));
    assert_eq!(missing, ("CommandNotFound".to_owned(), "The command nonsense has not been found".to_owned()));
    assert_eq!(client.error(json!({})), generic("QMP input lacks member 'execute'"));
    assert_eq!(client.error(json!({ "execute": 1 })), generic("QMP input member 'execute' must be a string"));
    let arguments = json!({ "execute": "stop", "arguments": [] });
    assert_eq!(client.error(arguments), generic("QMP input member 'arguments' must be an object"));
    assert_eq!(
        client.error(json!({ "execute": "stop", "x": 1 })),
        generic("QMP input member 'x' is unexpected")
    );
    let unexpected = json!({ "execute": "stop", "arguments": { "force": true } });
    assert_eq!(client.error(unexpected), generic("Parameter 'force' is unexpected"));
    assert_eq!(
        client.error(json!({ "execute": "human-monitor-command" })),
        generic("Parameter 'command-line' is missing")
    );
    let wrong = json!({ "execute": "human-monitor-command", "arguments": { "command-line": 5 } });
    assert!(client.error(wrong).1.starts_with("Invalid parameter type for 'command-line'"));
    client.send("garbage\n");
    assert!(client.receive()["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"));
    client.send("{\"execute\":}");
    assert!(client.receive()["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"));
    assert_eq!(client.run("query-status"), json!({ "running": false, "status": "prelaunch" }));
}

#[test]
fn a_life_with_events_for_everyone() {
    let server = Server::start();
    server.create();
    let mut first = server.negotiated();
    let mut second = server.negotiated();
    assert_eq!(first.run("query-name"), json!({ "name": "guest" }));
    assert_eq!(first.run("query-uuid"), json!({ "UUID": "00000000-0000-0000-0000-000000000000" }));
    assert_eq!(first.run("cont"), json!({}));
    assert_eq!(first.run("query-status"), json!({ "running": true, "status": "running" }));
    // The event comes before the answer, to the client that asked and to the other.
    first.send("{\"execute\":\"stop\",\"id\":7}");
    let event = first.receive();
    assert_eq!(event["event"], "STOP");
    assert!(event["timestamp"]["seconds"].is_u64() && event["timestamp"]["microseconds"].is_u64());
    assert_eq!(first.receive(), json!({ "return": {}, "id": 7 }));
    assert_eq!(second.receive()["event"], "STOP");
    assert_eq!(first.run("stop"), json!({}), "a second stop is no error");
    first.send("{\"execute\":\"cont\"}{\"execute\":\"system_reset\"}{\"execute\":\"system_powerdown\"}");
    let names: Vec<String> = (0..6)
        .map(|_| first.receive())
        .map(|message| message["event"].as_str().unwrap_or("return").to_owned())
        .collect();
    assert_eq!(names, ["RESUME", "return", "RESET", "return", "POWERDOWN", "return"]);
    assert_eq!(first.run("inject-nmi"), json!({}));
    for _ in 0..3 {
        second.receive();
    }
    second.send("{\"execute\":\"quit\"}");
    let (one, two) = (second.receive(), second.receive());
    let event = if one.get("event").is_some() { one } else { two };
    assert_eq!(event["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
}

#[test]
fn queries_answer_in_the_schemas_shapes() {
    let server = Server::start();
    server.create();
    server.handle.call(Boot).unwrap();
    let mut client = server.negotiated();
    assert_eq!(client.run("query-kvm"), json!({ "enabled": false, "present": true }));
    assert_eq!(client.run("query-cpus-fast")[0]["props"], json!({ "core-id": 0 }));
    assert_eq!(client.run("query-machines")[0]["cpu-max"], 8);
    assert_eq!(client.run("query-chardev")[0]["frontend-open"], true);
    assert_eq!(client.run("query-block"), json!([]));
    assert_eq!(client.run("query-pci"), json!([{ "bus": 0, "devices": [] }]));
    let commands = client.run("query-commands");
    let names: Vec<&str> =
        commands.as_array().unwrap().iter().map(|command| command["name"].as_str().unwrap()).collect();
    let schema = client.run("query-qmp-schema");
    let schema = schema.as_array().unwrap();
    let find = |name: &str| schema.iter().find(|entity| entity["name"] == name);
    for name in &names {
        let command = find(name).unwrap_or_else(|| panic!("{name} has no schema"));
        assert_eq!(command["meta-type"], "command");
        for of in ["arg-type", "ret-type"] {
            assert!(find(command[of].as_str().unwrap()).is_some(), "{command}");
        }
    }
    // Every type that is mentioned is there.
    for entity in schema {
        let members = entity.get("members").and_then(Value::as_array).cloned().unwrap_or_default();
        for member in members.iter().filter_map(|member| member.get("type")) {
            assert!(find(member.as_str().unwrap()).is_some(), "{member} in {entity}");
        }
        if let Some(element) = entity.get("element-type") {
            assert!(find(element.as_str().unwrap()).is_some(), "{element}");
        }
    }
    assert_eq!(find("RunState").unwrap()["meta-type"], "enum");
    assert_eq!(find("POWERDOWN").unwrap()["meta-type"], "event");
    let kvm = find("KvmInfo").unwrap();
    assert_eq!(kvm["members"][0], json!({ "name": "enabled", "type": "bool" }));
}

#[test]
fn the_human_monitor() {
    let server = Server::start();
    server.create();
    server.handle.call(Boot).unwrap();
    let mut client = server.negotiated();
    let mut hmp = |line: &str| {
        let arguments = json!({ "command-line": line });
        let reply = client.ask(json!({ "execute": "human-monitor-command", "arguments": arguments }));
        reply["return"].as_str().unwrap_or_else(|| panic!("{reply}")).to_owned()
    };
    assert_eq!(hmp("info status"), "VM status: running\r\n");
    assert_eq!(hmp("info registers"), "CPU#0\r\n pc 0000000080000000\r\n");
    assert_eq!(hmp("info registers 9"), "Error: there is no vCPU 9\r\n");
    assert_eq!(hmp("info mtree"), "memory\r\n");
    assert_eq!(hmp("info qtree"), "bus: main\r\n");
    assert_eq!(hmp("info jit"), "Error: nothing is translated\r\n");
    assert_eq!(hmp("x /2xb 0x10"), "0000000000000010: 0x00 0x01\r\n");
    assert_eq!(hmp("xp/1xw 16"), "0000000000000010: 0x03020100\r\n");
    assert_eq!(hmp("xp 0x10000"), "Cannot access memory at address 0x10000\r\n");
    assert_eq!(hmp("frobnicate"), "unknown command: 'frobnicate'\r\n");
    assert!(hmp("help").contains("info mtree"));
}

#[test]
fn tcp_serves_too() {
    let (handle, inbox) = control().unwrap();
    std::thread::spawn(move || common::FakeManager::default().serve(&inbox));
    let address = QmpAddress::Tcp("127.0.0.1".to_owned(), 0);
    let listeners = Listeners::bind(None, Some(&address), None).unwrap();
    let address = listeners.qmp_tcp_address().unwrap();
    let api = ApiThread::start(&PlainSpawner, handle, listeners).unwrap();
    let stream = TcpStream::connect(address).unwrap();
    let mut client = Client { writer: stream.try_clone().unwrap(), reader: BufReader::new(stream) };
    assert!(client.receive().get("QMP").is_some());
    assert_eq!(client.run("qmp_capabilities"), json!({}));
    assert_eq!(client.run("query-version")["qemu"]["micro"], 0);
    api.stop();
    let mut rest = String::new();
    assert_eq!(client.reader.read_line(&mut rest).unwrap(), 0, "the connection ends with the server");
}
