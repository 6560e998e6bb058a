//! What images say of themselves, in QEMU's JSON.

use serde_json::{Map, Value, json};

use crate::crypto::IvGenerator;
use crate::luks::header::Header;
use crate::qcow2::Qcow2;
use crate::qcow2::header::{AUTOCLEAR_RAW, LAZY_REFCOUNTS, incompatible};

/// What there is to say of a LUKS header; within an image with the name of the format.
pub fn luks_json(header: &Header, within: bool) -> Value {
    let spec = &header.cipher;
    let mut data = Map::new();
    if let Some(iv) = spec.iv {
        data.insert("ivgen-alg".into(), json!(iv.name()));
        if let IvGenerator::Essiv(hash) = iv {
            data.insert("ivgen-hash-alg".into(), json!(hash.name()));
        }
    }
    data.insert("hash-alg".into(), json!(header.hash.name()));
    data.insert("cipher-alg".into(), json!(format!("{}-{}", spec.algorithm.name(), spec.key * 8)));
    data.insert("uuid".into(), json!(header.uuid));
    if within {
        data.insert("format".into(), json!("luks"));
    }
    data.insert("cipher-mode".into(), json!(spec.mode.name()));
    let slots = header.slots.iter().map(|slot| {
        let offset = u64::from(slot.offset) * 512;
        if slot.active {
            json!({ "active": true, "iters": slot.iterations, "key-offset": offset, "stripes": slot.stripes })
        } else {
            json!({ "active": false, "key-offset": offset })
        }
    });
    data.insert("slots".into(), slots.collect());
    data.insert("payload-offset".into(), json!(u64::from(header.payload) * 512));
    data.insert("master-key-iters".into(), json!(header.digest_iterations));
    Value::Object(data)
}

/// What there is to say of a qcow2 image: `format-specific`.
pub fn qcow2_specific(image: &Qcow2) -> Value {
    let header = image.header();
    let mut data = Map::new();
    data.insert("compat".into(), json!(if header.version == 2 { "0.10" } else { "1.1" }));
    if let (Some(name), true) = (&header.data_file, header.has_data_file()) {
        data.insert("data-file".into(), json!(name));
    }
    if header.has_data_file() {
        data.insert("data-file-raw".into(), json!(header.autoclear & AUTOCLEAR_RAW != 0));
    }
    data.insert("compression-type".into(), json!(header.compression.name()));
    if header.version >= 3 {
        data.insert("lazy-refcounts".into(), json!(header.compatible & LAZY_REFCOUNTS != 0));
    }
    let bitmaps: Vec<Value> = image.bitmaps().iter().map(|b| {
        json!({ "flags": Qcow2::bitmap_flags(b), "name": b.name, "granularity": 1u64 << b.granularity_bits })
    }).collect();
    if !bitmaps.is_empty() {
        data.insert("bitmaps".into(), json!(bitmaps));
    }
    data.insert("refcount-bits".into(), json!(1u64 << header.refcount_order));
    if header.version >= 3 {
        data.insert("corrupt".into(), json!(header.incompatible & incompatible::CORRUPT != 0));
        data.insert("extended-l2".into(), json!(header.extended_l2()));
    }
    match header.crypt_method {
        1 => drop(data.insert("encrypt".into(), json!({ "format": "aes" }))),
        2 => {
            let header = image.luks_header().ok().flatten();
            drop(data.insert(
                "encrypt".into(),
                header.map_or(json!({ "format": "luks" }), |h| luks_json(&h, true)),
            ))
        }
        _ => {}
    }
    json!({ "type": "qcow2", "data": data })
}
