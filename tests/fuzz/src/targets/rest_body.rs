//! Bodies of REST requests.


/// Runs one input.
pub fn run(data: &[u8]) {
    if let Ok(config) = holdfast_config::VmConfig::from_json(data) {
        // Whatever parses can be checked, and written and read again.
        let _ = config.validate();
        let text = serde_json::to_vec(&config).expect("serialisable");
        assert_eq!(holdfast_config::VmConfig::from_json(&text).expect("our own output"), config);
    }
}
