//! The power button as its driver sees it.

use super::build_power_button;
use crate::device::feature;
use crate::testing::{DATA, Rig, WRITE, context};

fn rig() -> (Rig, std::sync::Arc<super::PowerButton>) {
    let context = context();
    let device = build_power_button("__button", &context).expect("builds");
    (Rig::new(context, device.clone()), device)
}

#[test]
fn the_config_space_describes_a_keyboard_with_one_key() {
    let (rig, _) = rig();
    let item = |select: u8, subsel: u8| {
        rig.write_config(0, &[select]);
        rig.write_config(1, &[subsel]);
        let size = rig.config(2, 1)[0];
        rig.config(8, usize::from(size))
    };
    assert_eq!(item(1, 0), b"Power Button");
    let keys = item(0x11, 1);
    assert_eq!((keys.len(), keys[116 / 8]), (15, 1 << (116 % 8)));
    assert_eq!(keys[..14], [0; 14]);
    for (select, subsel) in [(0x11, 2), (0x10, 0), (0x12, 0), (1, 1), (0xff, 0xff)] {
        assert!(item(select, subsel).is_empty(), "{select:#x} {subsel:#x}");
    }
    assert_eq!(rig.config(200, 4), [0; 4], "past the end");
}

#[test]
fn a_press_arrives_as_key_down_and_key_up() {
    let (mut rig, button) = rig();
    assert!(!button.press(), "nobody listens yet");
    rig.start(feature::QUEUES);
    let heads: Vec<_> = (0..4u64).map(|i| rig.rings[0].chain(&[(DATA + 8 * i, 8, WRITE)])).collect();
    heads.into_iter().for_each(|head| rig.rings[0].publish(head));
    rig.kick(0);
    assert!(button.press());
    for _ in 0..4 {
        assert_eq!(rig.rings[0].wait_used().1, 8);
    }
    let seen = rig.peek(DATA, 32);
    assert_eq!(seen[..8], [1, 0, 116, 0, 1, 0, 0, 0]);
    assert_eq!(seen[8..16], [0; 8]);
    assert_eq!(seen[16..24], [1, 0, 116, 0, 0, 0, 0, 0]);
    assert_eq!(rig.device.counters()["presses"], 1);
    // The driver's status messages come back unread.
    assert_eq!(rig.request(1, &[(DATA, 8, 0)]), 0);
}

#[test]
fn presses_wait_for_buffers_and_survive_a_snapshot() {
    use crate::VirtioDevice;
    let (mut rig, button) = rig();
    rig.start(feature::QUEUES);
    for _ in 0..100 {
        assert!(button.press());
    }
    let state = button.save().expect("saved");
    assert_eq!(state["waiting"].as_array().expect("events").len(), 16, "no more than four presses wait");
    let (_, other) = self::rig();
    other.restore(&state).expect("restored");
    assert_eq!(other.save().expect("saved"), state);
    let mut bad = state.clone();
    let events = bad["waiting"].as_array_mut().expect("events");
    events.extend(events.clone());
    assert!(other.restore(&bad).is_err());
    button.reset();
    assert_eq!(button.save().expect("saved")["waiting"], serde_json::json!([]));
}

#[test]
fn a_buffer_too_small_for_an_event_breaks_the_device() {
    let (mut rig, button) = rig();
    rig.start(feature::QUEUES);
    let head = rig.rings[0].chain(&[(DATA, 4, WRITE)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    assert!(button.press());
    crate::testing::eventually("needs reset", || rig.status() & 0x40 != 0);
}
