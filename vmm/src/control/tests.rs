use std::sync::mpsc;

use super::*;

#[test]
fn a_dropped_request_is_answered() {
    let (handle, inbox) = control().unwrap();
    let (sender, receiver) = mpsc::channel();
    handle.submit(QueryStatus, move |result| sender.send(result.map_err(|e| e.kind())).unwrap());
    drop(inbox.next_request());
    assert_eq!(receiver.recv().unwrap(), Err(ErrorKind::Failed));
    assert!(inbox.next_request().is_none());
    drop(inbox);
    assert_eq!(handle.call(QueryStatus).unwrap_err().kind(), ErrorKind::Failed);
}

#[test]
fn the_chain_is_outermost_first() {
    let inner = std::io::Error::other("no space");
    let error = ControlError::failed("Cannot write the snapshot", inner);
    assert_eq!(error.chain(), ["Cannot write the snapshot", "no space"]);
    assert_eq!(error.describe(), "Cannot write the snapshot: no space");
    assert_eq!(error.kind().http_status(), 500);
}

#[test]
fn events_have_both_faces() {
    let bus = EventBus::new();
    let first = bus.subscribe();
    let second = bus.subscribe();
    bus.publish(Event::Shutdown(Origin::Guest));
    drop(second);
    bus.publish(Event::Paused);
    let event = first.recv().unwrap();
    let monitor = event.to_monitor().unwrap();
    assert_eq!(monitor["source"], "vm");
    assert_eq!(monitor["event"], "shutdown");
    assert_eq!(monitor["properties"], serde_json::Value::Null);
    let keys: Vec<_> = monitor.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["timestamp", "source", "event", "properties"]);
    let qmp = event.to_qmp().unwrap();
    assert_eq!(qmp["event"], "SHUTDOWN");
    assert_eq!(qmp["data"], serde_json::json!({ "guest": true, "reason": "guest-shutdown" }));
    assert!(qmp["timestamp"]["seconds"].as_u64().unwrap() > 1_000_000_000);
    assert_eq!(first.recv().unwrap().to_qmp().unwrap()["event"], "STOP");
}
