//! What QMP clients send.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let requests = holdfast_api::qmp::read_stream(data);
    // Every request has two brackets at least.
    assert!(requests * 2 <= data.len());
});
