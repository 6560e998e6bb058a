//! key=value options of the command line.

use holdfast_config as config;

/// Runs one input.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = holdfast_keyval::pairs(text);
    let _ = holdfast_keyval::parse_size(text);
    let disk = holdfast_keyval::from_str::<config::DiskConfig>(text);
    let net = holdfast_keyval::from_str::<config::NetConfig>(text);
    let cpus = holdfast_keyval::from_str::<config::CpusConfig>(text);
    let restore = holdfast_keyval::from_str::<config::RestoreConfig>(text);
    // Whatever can be read can be checked; what cannot is said in words.
    let _ = disk.map(|disk| config::validate_disk(&disk)).map_err(|error| error.to_string());
    let _ = net.map(|net| config::validate_net(&net)).map_err(|error| error.to_string());
    let _ = restore.map_err(|error| error.to_string());
    if let Ok(cpus) = cpus {
        let _ = config::VmConfig { cpus, ..config::VmConfig::default() }.validate();
    }
}
