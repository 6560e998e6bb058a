//! `check`.

use clap::ValueEnum;
use holdfast_block::graph::Backing;
use holdfast_block::qcow2::check::{Fix, Report};
use serde_json::{Map, json};

use crate::common::{ImgError, Output, Result, Source, errno, print, print_json};

/// What `-r` repairs.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Repair {
    /// Clusters that nothing refers to.
    Leaks,
    /// Everything that can be.
    All,
}

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// Repair what is found
    #[arg(short, long, value_enum)]
    repair: Option<Repair>,
    /// Shape of the output
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Cache mode
    #[arg(short = 'T', long)]
    cache: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    filename: String,
}

/// Exit statuses.
const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const UNSUPPORTED: u8 = 63;

fn human(report: &Report) -> String {
    let mut out = String::new();
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        out += "No errors were found on the image.\n";
    } else {
        if report.corruptions != 0 {
            out += &format!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
                report.corruptions
            );
        }
        if report.leaks != 0 {
            out += &format!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
                report.leaks
            );
        }
        if report.check_errors != 0 {
            out += &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
        }
    }
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        let (all, allocated) = (report.total_clusters, report.allocated_clusters);
        out += &format!(
            "{allocated}/{all} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            allocated as f64 * 100.0 / all as f64,
            report.fragmented_clusters as f64 * 100.0 / allocated as f64,
            report.compressed_clusters as f64 * 100.0 / allocated as f64
        );
    }
    if report.image_end_offset > 0 {
        out += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    out
}

fn to_json(report: &Report, name: &str) -> serde_json::Value {
    let mut map = Map::new();
    map.insert("check-errors".into(), json!(report.check_errors));
    for (key, value) in [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if value != 0 {
            map.insert(key.into(), json!(value));
        }
    }
    map.insert("filename".into(), json!(name));
    map.insert("format".into(), json!("qcow2"));
    map.into()
}

fn show_fixes(report: &Report) -> String {
    let mut out = String::new();
    if report.leaks_fixed != 0 || report.corruptions_fixed != 0 {
        out += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        );
    }
    out
}

/// The check of a format that only knows faults.
fn simple(args: &Args, format: &str, faults: std::io::Result<Vec<String>>) -> Result<u8> {
    let faults = faults
        .map_err(|e| ImgError::Status { text: format!("Check failed: {}", errno(&e)), status: FAILED })?;
    let report = Report { corruptions: faults.len() as u64, ..Report::default() };
    if args.output == Output::Json {
        let mut value = to_json(&report, &args.filename);
        if let Some(place) = value.get_mut("format") {
            *place = json!(format);
        }
        print_json(&value)?;
    } else if !args.quiet {
        faults.iter().for_each(|m| eprintln!("{m}"));
        print(&human(&report))?;
    }
    Ok(if faults.is_empty() { 0 } else { CORRUPT })
}

/// `check`. `name` is the program's.
pub(crate) fn run(args: &Args, name: &str) -> Result<u8> {
    let fix = match args.repair {
        None => Fix::None,
        Some(Repair::Leaks) => Fix::Leaks,
        Some(Repair::All) => Fix::All,
    };
    let source = Source {
        image_opts: args.image_opts,
        share: args.force_share,
        cache: args.cache.as_deref(),
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let mut opener = source.opener(fix != Fix::None)?;
    opener.for_check = true;
    opener.backing = Backing::Ignore;
    let node = source.open_with(&opener)?;
    if let Some(faults) = node.faults() {
        return simple(args, node.driver(), faults);
    }
    let Some(image) = node.as_qcow2() else {
        return Err(ImgError::Status {
            text: "This image format does not support checks".into(),
            status: UNSUPPORTED,
        });
    };
    let fail =
        |e: std::io::Error| ImgError::Status { text: format!("Check failed: {}", errno(&e)), status: FAILED };
    let mut report = image.check(fix).map_err(fail)?;
    let (leaks_fixed, corruptions_fixed) = (report.leaks_fixed, report.corruptions_fixed);
    let human_output = args.output == Output::Human && !args.quiet;
    let mut faults: Vec<String> = report.messages.clone();
    if leaks_fixed != 0 || corruptions_fixed != 0 {
        if human_output {
            faults.iter().for_each(|m| eprintln!("{m}"));
            print(&show_fixes(&report))?;
        }
        report = image.check(Fix::None).map_err(fail)?;
        faults = report.messages.clone();
        report.leaks_fixed = leaks_fixed;
        report.corruptions_fixed = corruptions_fixed;
    }
    if human_output {
        faults.iter().for_each(|m| eprintln!("{m}"));
        print(&human(&report))?;
    } else if args.output == Output::Json {
        print_json(&to_json(&report, &args.filename))?;
    }
    if report.check_errors != 0 {
        eprintln!("{name}: the check is not complete");
        return Ok(FAILED);
    }
    Ok(match (report.corruptions, report.leaks) {
        (0, 0) => 0,
        (0, _) => LEAKS,
        _ => CORRUPT,
    })
}
