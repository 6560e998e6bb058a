//! What QMP clients send.


/// Runs one input.
pub fn run(data: &[u8]) {
    let requests = holdfast_api::qmp::read_stream(data);
    // Every request has two brackets at least.
    assert!(requests * 2 <= data.len());
}
