//! What Cloud Hypervisor's clients rely on.

use serde_json::json;

use crate::balloon::config::BalloonConfig;
use crate::blk::config::{DiskConfig, ImageType};
use crate::console::config::{ConsoleConfig, ConsoleMode};
use crate::net::config::NetConfig;
use crate::rng::config::RngConfig;
use crate::vsock::config::VsockConfig;

#[test]
fn defaults_are_those_of_an_empty_object() {
    let disk: DiskConfig = serde_json::from_value(json!({})).expect("all fields have defaults");
    assert_eq!(disk, DiskConfig::default());
    assert_eq!((disk.num_queues, disk.queue_size, disk.sparse), (1, 128, true));
    let net: NetConfig = serde_json::from_value(json!({})).expect("all fields have defaults");
    assert_eq!(net, NetConfig::default());
    assert_eq!((net.num_queues, net.queue_size, net.offload_ufo), (2, 256, true));
    assert!(net.validate().is_empty());
}

#[test]
fn absent_options_are_omitted_and_unknown_fields_tolerated() {
    let text = json!({"path": "/a", "image_type": "Raw", "from_the_future": 1});
    let disk: DiskConfig = serde_json::from_value(text).expect("tolerated");
    assert_eq!(disk.image_type, Some(ImageType::Raw));
    assert!(disk.validate().is_empty());
    let out = serde_json::to_string(&disk).expect("serialises");
    assert!(!out.contains("null"), "{out}");
    let console: ConsoleConfig = serde_json::from_value(json!({"mode": "Tty"})).expect("a console");
    assert_eq!(console.mode, ConsoleMode::Tty);
}

#[test]
fn every_wrong_field_is_named_at_once() {
    let text = json!({"vhost_user": true, "path": "/x", "queue_size": 100, "num_queues": 0, "serial": "x".repeat(21),
        "iommu": true, "rate_limiter_config": {"ops": {"size": 1, "refill_time": 2}}, "image_type": "Vhdx"});
    let disk: DiskConfig = serde_json::from_value(text).expect("parses");
    let fields: Vec<_> = disk.validate().into_iter().map(|e| e.field).collect();
    for field in [
        "vhost_socket",
        "path",
        "queue_size",
        "num_queues",
        "serial",
        "iommu",
        "rate_limiter_config",
        "image_type",
    ] {
        assert!(fields.contains(&field), "{field} in {fields:?}");
    }
    let text = json!({"tap": "a-name-that-is-too-long", "mtu": 5, "mask": "255.0.0.0", "num_queues": 3,
        "mac": "01:00:00:00:00:00", "fds": [1, 2]});
    let net: NetConfig = serde_json::from_value(text).expect("parses");
    let fields: Vec<_> = net.validate().into_iter().map(|e| e.field).collect();
    for field in ["tap", "mtu", "mask", "num_queues", "mac", "fds"] {
        assert!(fields.contains(&field), "{field} in {fields:?}");
    }
    let balloon: BalloonConfig = serde_json::from_value(json!({"size": u64::MAX})).expect("parses");
    assert_eq!(balloon.validate()[0].field, "size");
    let rng = RngConfig { src: "".into(), ..RngConfig::default() };
    assert_eq!(rng.validate()[0].field, "src");
}

#[test]
fn the_kernels_vhost_is_asked_for_in_words_that_fit_together() {
    let net = |text: serde_json::Value| {
        let net: NetConfig = serde_json::from_value(text).expect("parses");
        net.validate().into_iter().map(|e| e.field).collect::<Vec<_>>()
    };
    assert!(net(json!({"vhost": true, "vhostfd": [7]})).is_empty());
    assert_eq!(net(json!({"vhost": true, "vhostfds": [7], "num_queues": 4})), ["vhostfds"]);
    assert_eq!(net(json!({"vhostfds": [7]})), ["vhostfds"]);
    assert_eq!(net(json!({"vhost": true, "vhost_user": true, "vhost_socket": "/s"})), ["vhost"]);
    let vsock = |text: serde_json::Value| {
        let vsock: VsockConfig = serde_json::from_value(text).expect("parses");
        vsock.validate().into_iter().map(|e| e.field).collect::<Vec<_>>()
    };
    assert!(vsock(json!({"cid": 3, "vhost": true, "vhostfd": 7})).is_empty());
    assert_eq!(vsock(json!({"cid": 3, "vhost": true, "socket": "/s"})), ["socket"]);
    assert_eq!(vsock(json!({"cid": 3})), ["socket"]);
    assert_eq!(vsock(json!({"cid": 0, "vhost": true})), ["cid"]);
    assert_eq!(vsock(json!({"cid": 3, "socket": "/s", "vhostfd": 7})), ["vhostfd"]);
    assert_eq!(
        vsock(json!({"cid": 3, "socket": "/s", "vhost_user": true, "vhost": true})),
        ["socket", "vhost"]
    );
    // Clients that know nothing of it see nothing of it.
    let out =
        serde_json::to_string(&(NetConfig::default(), VsockConfig::new(3, "/s".into()))).expect("serialises");
    assert!(!out.contains("\"vhost\"") && !out.contains("vhostfd"), "{out}");
}
