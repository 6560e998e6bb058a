//! The suite on translation: the same guests with the same output as on KVM.
//! `HOLDFAST_CASE=text` runs only the cases whose name contains the text.

use std::error::Error;

use holdfast_accel::IrqChip;
use holdfast_accel_tcg::TcgAccelerator;
use holdfast_conformance::{cases, hardware_cases, translation_cases};

#[test]
fn translation_conforms() {
    let wanted = std::env::var("HOLDFAST_CASE").unwrap_or_default();
    let mut failed = Vec::new();
    let mut all = cases();
    all.extend(hardware_cases());
    all.extend(translation_cases());
    for case in all.iter().filter(|c| c.name.contains(&wanted)) {
        if let Err(e) = case.check(&TcgAccelerator::default(), IrqChip::Split) {
            let mut text = format!("{}: {e}", case.name);
            let mut cause = e.source();
            while let Some(c) = cause {
                text += &format!(": {c}");
                cause = c.source();
            }
            eprintln!("FAILED {text}");
            failed.push(text);
        } else {
            eprintln!("ok {}", case.name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:#?}");
}
