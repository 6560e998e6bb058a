//! Holds the picture in docs/design.md: dependencies between the workspace's folders point down.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Top-level folders from the top down, with what each may use besides itself.
const LAYERS: &[(&str, &[&str])] = &[
    ("tests", &["api", "vmm", "virtio-devices", "devices", "block", "net", "accel-tcg", "arch"]),
    ("api", &["vmm", "virtio-devices", "devices", "block", "net", "accel-tcg", "arch"]),
    ("vmm", &["virtio-devices", "devices", "block", "net", "accel-tcg", "arch", "api/keyval"]),
    ("virtio-devices", &["devices", "block", "net", "arch"]),
    ("devices", &["arch"]),
    ("block", &["arch"]),
    ("net", &["arch"]),
    ("accel-tcg", &["arch"]),
    ("arch", &[]),
    ("resources", &[]),
];

/// Folder of a package relative to the workspace root, e.g. `vmm/accel`.
fn folder(package: &Value, root: &str) -> String {
    let manifest = package["manifest_path"].as_str().expect("manifest path");
    let relative = manifest.strip_prefix(root).expect("package outside the workspace");
    relative.trim_start_matches('/').trim_end_matches("/Cargo.toml").to_owned()
}

#[test]
fn dependencies_point_down_only() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let root = metadata["workspace_root"].as_str().expect("root");
    let packages = metadata["packages"].as_array().expect("packages");
    let folders: BTreeMap<&str, String> =
        packages.iter().map(|p| (p["name"].as_str().expect("name"), folder(p, root))).collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let from = &folders[name];
        let top = from.split('/').next().expect("a folder");
        let allowed = LAYERS.iter().find(|(t, _)| *t == top);
        let Some((_, allowed)) = allowed else {
            wrong.push(format!("{name} lies in `{top}`, which is not in the picture"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let to_name = dependency["name"].as_str().expect("name");
            let Some(to) = folders.get(to_name) else { continue };
            let to_top = to.split('/').next().expect("a folder");
            let fine = to_top == top || allowed.iter().any(|a| *a == to_top || *a == to.as_str());
            if !fine {
                wrong.push(format!("{name} ({from}) depends on {to_name} ({to})"));
            }
        }
    }
    assert!(folders.len() > 15, "only {} packages were seen", folders.len());
    assert!(wrong.is_empty(), "arrows that point up:\n{}", wrong.join("\n"));
}
