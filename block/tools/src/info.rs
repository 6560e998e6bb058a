//! `info`.

use std::path::Path;
use std::sync::Arc;

use holdfast_block::facts::ImageInfo;
use holdfast_block::graph::{Backing, beside};
use holdfast_block::options::Driver;
use holdfast_block::{BlockNode, SECTOR};
use serde_json::{Value, json};

use crate::common::{Output, Result, Source, human_size, print, print_json, refused};
use crate::snapshot;

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// Shape of the output
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// The backing files too
    #[arg(short, long)]
    backing_chain: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    filename: String,
}

fn child(name: &str, node: &Arc<dyn BlockNode>) -> Value {
    let file = node.path().map(|p| p.display().to_string()).unwrap_or_default();
    let mut info = ImageInfo::of(&file, &**node);
    info.virtual_size = info.virtual_size.next_multiple_of(SECTOR);
    json!({ "name": name, "info": with_children(&info, Vec::new()) })
}

/// An image with the nodes below it.
fn with_children(info: &ImageInfo, children: Vec<Value>) -> Value {
    let mut value = json!(info);
    if let Value::Object(map) = &mut value {
        map.insert("children".into(), children.into());
    }
    value
}

/// Where the backing file is, by the names in an image.
fn backing_place(node: &Arc<dyn BlockNode>) -> Option<(String, String, Option<String>)> {
    let header = node.as_qcow2()?.header();
    let name = header.backing_file?;
    let directory = node.path().as_deref().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
    let full = beside(&directory, &name);
    Some((name, full, header.backing_format))
}

/// What there is to say of an image.
pub(crate) fn image_info(name: &str, node: &Arc<dyn BlockNode>) -> Value {
    let mut children = Vec::new();
    if let Some(image) = node.as_qcow2()
        && let Some(data) = image.external_data()
    {
        let file = data.file().unwrap_or(data);
        children.push(child("data-file", &file));
    }
    if let Some(file) = node.file() {
        children.push(child("file", &file));
    }
    with_children(&ImageInfo::of(name, &**node), children)
}

fn specific(value: &Value, indent: usize, out: &mut String) {
    let pad = " ".repeat(indent);
    let line = |out: &mut String, key: &str, value: &Value| match value {
        // What is flattened comes last; among the rest it has its place.
        Value::Object(map) if map.contains_key("uuid") && map.contains_key("format") => {
            *out += &format!("{pad}{key}:\n");
            let (format, rest): (Vec<_>, Vec<_>) =
                map.clone().into_iter().partition(|(key, _)| key == "format");
            let at = rest.iter().position(|(key, _)| key == "uuid").map_or(0, |at| at + 1);
            let (before, after) = rest.split_at(at);
            specific(&[before, &format, after].concat().into_iter().collect(), indent + 4, out);
        }
        Value::Object(_) | Value::Array(_) => {
            *out += &format!("{pad}{key}:\n");
            specific(value, indent + 4, out);
        }
        Value::String(s) => *out += &format!("{pad}{key}: {s}\n"),
        other => *out += &format!("{pad}{key}: {other}\n"),
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| line(out, &k.replace('-', " "), v)),
        Value::Array(list) => list.iter().enumerate().for_each(|(n, v)| line(out, &format!("[{n}]"), v)),
        _ => {}
    }
}

fn human(info: &Value, node: &Arc<dyn BlockNode>) -> String {
    let number = |key: &str| info.get(key).and_then(Value::as_u64).unwrap_or(0);
    let text = |key: &str| info.get(key).and_then(Value::as_str).unwrap_or_default();
    let mut out = format!("image: {}\nfile format: {}\n", text("filename"), text("format"));
    let size = number("virtual-size");
    out += &format!("virtual size: {} ({size} bytes)\n", human_size(size));
    out += &format!("disk size: {}\n", human_size(number("actual-size")));
    if info.get("encrypted").is_some() {
        out += "encrypted: yes\n";
    }
    if info.get("cluster-size").is_some() {
        out += &format!("cluster_size: {}\n", number("cluster-size"));
    }
    if info.get("dirty-flag") == Some(&json!(true)) {
        out += "cleanly shut down: no\n";
    }
    if info.get("backing-filename").is_some() {
        let (short, full) = (text("backing-filename"), text("full-backing-filename"));
        let actual = if short == full { String::new() } else { format!(" (actual path: {full})") };
        out += &format!("backing file: {short}{actual}\n");
        if info.get("backing-filename-format").is_some() {
            out += &format!("backing file format: {}\n", text("backing-filename-format"));
        }
    }
    if let Some(image) = node.as_qcow2() {
        let snapshots = image.snapshots();
        if !snapshots.is_empty() {
            out += &snapshot::list(&snapshots);
        }
    }
    if let Some(data) = info.pointer("/format-specific/data") {
        out += "Format specific information:\n";
        specific(data, 4, &mut out);
    }
    for child in info.get("children").and_then(Value::as_array).into_iter().flatten() {
        let at = |key: &str| child.pointer(&format!("/info/{key}"));
        let size = at("virtual-size").and_then(Value::as_u64).unwrap_or(0);
        let word = |key| at(key).and_then(Value::as_str).unwrap_or_default();
        out += &format!("Child node '/{}':\n", child.get("name").and_then(Value::as_str).unwrap_or_default());
        out += &format!("    filename: {}\n    protocol type: {}\n", word("filename"), word("format"));
        out += &format!("    file length: {} ({size} bytes)\n", human_size(size));
        out += &format!(
            "    disk size: {}\n",
            human_size(at("actual-size").and_then(Value::as_u64).unwrap_or(0))
        );
    }
    out
}

/// `info`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let mut all = Vec::new();
    let mut next = Some((args.filename.clone(), args.format.clone(), args.image_opts));
    let mut seen = Vec::new();
    while let Some((name, format, image_opts)) = next.take() {
        let source = Source { image_opts, share: args.force_share, ..Source::new(&name, format.as_deref()) };
        let mut opener = source.opener(false)?;
        opener.metadata_only = true;
        opener.backing = Backing::Ignore;
        let node = source.open_with(&opener)?;
        if let Some(path) = node.path().and_then(|p| std::fs::canonicalize(p).ok()) {
            if seen.contains(&path) {
                return refused(format!("Backing file '{name}' creates an infinite loop."));
            }
            seen.push(path);
        }
        let shown =
            if image_opts { node.path().map(|p| p.display().to_string()).unwrap_or_default() } else { name };
        let info = image_info(&shown, &node);
        if let (true, Some((_, full, format))) = (args.backing_chain, backing_place(&node)) {
            let known = format.filter(|f| Driver::from_name(f).is_ok());
            next = Some((full, known, false));
        }
        all.push((info, node));
    }
    match (args.output, args.backing_chain) {
        (Output::Json, true) => print_json(&Value::Array(all.into_iter().map(|(i, _)| i).collect()))?,
        (Output::Json, false) => {
            for (info, _) in &all {
                print_json(info)?;
            }
        }
        (Output::Human, _) => {
            let texts: Vec<String> = all.iter().map(|(info, node)| human(info, node)).collect();
            print(&texts.join("\n"))?;
        }
    }
    Ok(0)
}
