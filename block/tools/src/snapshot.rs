//! `snapshot`.

use holdfast_block::qcow2::snapshot::Snapshot;

use crate::common::{ImgError, Result, Source, errno, human_size, print, qcow2, refused};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// List all snapshots
    #[arg(short, long, group = "action")]
    list: bool,
    /// Make a snapshot of this name
    #[arg(short, long, group = "action")]
    create: Option<String>,
    /// Make the disk what it was at this snapshot
    #[arg(short, long, group = "action")]
    apply: Option<String>,
    /// Delete this snapshot
    #[arg(short, long, group = "action")]
    delete: Option<String>,
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

/// Local date and time of seconds since 1970.
fn date(seconds: u32) -> String {
    let time = libc::time_t::from(seconds);
    // SAFETY: all-zero bytes are a valid `tm`.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    unsafe { libc::localtime_r(&time, &mut tm) };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}

/// The table of snapshots.
pub(crate) fn list(snapshots: &[Snapshot]) -> String {
    let mut out = String::from("Snapshot list:\n");
    out += &format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for s in snapshots {
        let seconds = s.vm_clock_nsec / 1_000_000_000;
        let milliseconds = s.vm_clock_nsec / 1_000_000 % 1000;
        let clock =
            format!("{:04}:{:02}:{:02}.{milliseconds:03}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        let icount = if s.icount == u64::MAX { "--".to_owned() } else { s.icount.to_string() };
        let size = human_size(s.vm_state_size);
        out += &format!(
            "{:<7} {:<16} {size:>8} {:>19} {clock:>15} {icount:>10}\n",
            s.id,
            s.name,
            date(s.date_sec)
        );
    }
    out
}

/// `snapshot`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let writes = args.create.is_some() || args.apply.is_some() || args.delete.is_some();
    let source = Source {
        image_opts: args.image_opts,
        share: args.force_share,
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let node = source.open(writes)?;
    if !writes {
        if let Some(image) = node.as_qcow2() {
            let snapshots = image.snapshots();
            if !snapshots.is_empty() {
                print(&list(&snapshots))?;
            }
        }
        return Ok(0);
    }
    let image = qcow2(&node, "An internal snapshot")?;
    let fail = |what: &str, name: &str, e: std::io::Error| {
        let text = if e.kind() == std::io::ErrorKind::NotFound {
            "snapshot not found".to_owned()
        } else {
            errno(&e)
        };
        Err(ImgError::Refused(format!("Could not {what} snapshot '{name}': {text}")))
    };
    if let Some(name) = &args.create {
        image.create_snapshot(name, holdfast_clock::host_realtime()).or_else(|e| fail("create", name, e))?;
    } else if let Some(name) = &args.apply {
        image.apply_snapshot(name).or_else(|e| fail("apply", name, e))?;
    } else if let Some(name) = &args.delete {
        image.delete_snapshot(name).or_else(|e| fail("delete", name, e))?;
    } else {
        return refused("no action");
    }
    image.close().or_else(|e| fail("store", "", e))?;
    Ok(0)
}
