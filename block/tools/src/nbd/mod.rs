//! `holdfast nbd`: exports images to NBD clients. Options are those of `qemu-nbd`, whose name works too.

mod daemon;

use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use holdfast_block::BlockNode;
use holdfast_block::format::RawFormat;
use holdfast_block::nbd::proto::transmission;
use holdfast_block::nbd::{Address, BitmapContext, Export, HANDSHAKE, Listener, Server, TlsClient, list};
use holdfast_block::options::DetectZeroes;
use holdfast_objects::tls::ServerConfig;
use holdfast_threads::{PlainSpawner, Role, Spawner};

use crate::common::{
    ImgError, Result, Source, check_aio, errno, failed, make_objects, objects, overlay, print, refused,
    size_argument,
};
use daemon::{Daemon, Event};

/// Arguments.
#[derive(Debug, Parser)]
#[command(about = "Export disk images to NBD clients", version, arg_required_else_help = true)]
pub(crate) struct Args {
    /// Port to listen on
    #[arg(short, long, default_value_t = 10809)]
    port: u16,
    /// Address to listen on
    #[arg(short, long, default_value = "0.0.0.0")]
    bind: String,
    /// UNIX socket to listen on instead
    #[arg(short = 'k', long)]
    socket: Option<String>,
    /// Clients at a time
    #[arg(short = 'e', long, default_value_t = 1)]
    shared: usize,
    /// Go on after the last client has gone
    #[arg(short = 't', long)]
    persistent: bool,
    /// Say more
    #[arg(short, long)]
    verbose: bool,
    /// Name of the export
    #[arg(short = 'x', long = "export-name", alias = "exportname", default_value = "")]
    export_name: String,
    /// Words for people
    #[arg(short = 'D', long)]
    description: Option<String>,
    /// Where the exported disk starts in the image
    #[arg(short, long)]
    offset: Option<String>,
    /// Offer qemu:allocation-depth
    #[arg(short = 'A', long)]
    allocation_depth: bool,
    /// Offer a persistent dirty bitmap
    #[arg(short = 'B', long = "bitmap")]
    bitmaps: Vec<String>,
    /// List the exports of a server
    #[arg(short = 'L', long)]
    list: bool,
    /// Make an object that other options name, such as `tls-creds-x509,id=ID,dir=DIR,endpoint=server`
    #[arg(long = "object", value_name = "TYPE,id=ID,...")]
    objects: Vec<String>,
    /// TLS credentials
    #[arg(long)]
    tls_creds: Option<String>,
    /// Object that says which clients may connect, by the names in their certificates
    #[arg(long)]
    tls_authz: Option<String>,
    /// With --list: the name that the server's certificate must have
    #[arg(long)]
    tls_hostname: Option<String>,
    /// Go to the background once clients can connect
    #[arg(long)]
    fork: bool,
    /// Where to write the process id
    #[arg(long)]
    pid_file: Option<String>,
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// Clients do not write
    #[arg(short, long)]
    read_only: bool,
    /// An internal snapshot, read-only
    #[arg(short = 'l', long)]
    load_snapshot: Option<String>,
    /// Write to a temporary file over the image, which is not changed
    #[arg(short, long)]
    snapshot: bool,
    /// How requests are carried out: threads
    #[arg(long)]
    aio: Option<String>,
    /// What becomes of writes of zeroes: off, on or unmap
    #[arg(long)]
    detect_zeroes: Option<String>,
    /// Seconds that a client may take in the negotiation; 0 for any time
    #[arg(long)]
    handshake_limit: Option<String>,
    /// Bypass the host's page cache
    #[arg(short = 'n', long)]
    nocache: bool,
    /// Cache mode
    #[arg(long)]
    cache: Option<String>,
    /// What becomes of discards
    #[arg(long, value_parser = ["ignore", "off", "unmap", "on"], default_value = "ignore")]
    discard: String,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// The image
    filename: Option<String>,
}

/// Runs a command line whose first word is the program's name. Returns the exit status.
pub(crate) fn main(args: impl IntoIterator<Item = OsString>, name: &'static str) -> u8 {
    let args: Args = match crate::parse(args, name) {
        Ok(args) => args,
        Err(status) => return status,
    };
    match make_objects(&args.objects).and_then(|()| run(&args, name)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{name}: {error}");
            1
        }
    }
}

fn address(args: &Args) -> Address {
    match &args.socket {
        Some(path) => Address::Unix(path.into()),
        None if args.list && args.bind == "0.0.0.0" => Address::Tcp("localhost".to_owned(), args.port),
        None => Address::Tcp(args.bind.clone(), args.port),
    }
}

fn run(args: &Args, name: &'static str) -> Result<()> {
    if args.list {
        if args.tls_authz.is_some() {
            return refused("TLS authorization is incompatible with export list");
        }
        return show_exports(args);
    }
    if args.tls_hostname.is_some() {
        return refused("--tls-hostname is of use with --list only");
    }
    let tls = tls_server(args)?;
    let authz = args.tls_authz.as_deref().map(|id| objects().authz(id)).transpose();
    let authz = authz.map_err(|e| ImgError::Refused(e.to_string()))?;
    if authz.is_some() && tls.is_none() {
        return refused("--tls-authz needs --tls-creds");
    }
    let node = open(args)?;
    let bitmaps =
        args.bitmaps.iter().map(|b| bitmap(&node, b, args.read_only)).collect::<Result<Vec<_>>>()?;
    let patience = match args.handshake_limit.as_deref().map(str::parse::<u32>) {
        None => HANDSHAKE,
        Some(Ok(seconds)) => Duration::from_secs(u64::from(seconds)),
        Some(Err(_)) => {
            let text = args.handshake_limit.as_deref().unwrap_or_default();
            return refused(format!("Invalid handshake limit '{text}'"));
        }
    };
    let server = Server::patient(tls, authz, patience);
    server.add(Export {
        name: args.export_name.clone(),
        description: args.description.clone(),
        readonly: node.is_readonly(),
        allocation_depth: args.allocation_depth,
        bitmaps,
        multi_conn: args.shared != 1,
        node: Arc::clone(&node),
        guard: None,
    });
    let address = address(args);
    let listener = Listener::bind(&address).map_err(failed(format!("Failed to listen on {address}")))?;
    // Before there is a second thread.
    let child = match args.fork {
        true => Some(daemon::fork().map_err(failed("Failed to fork"))?),
        false => None,
    };
    if let Some(path) = &args.pid_file {
        let id = format!("{}\n", std::process::id());
        std::fs::write(path, id).map_err(failed(format!("cannot write {path}")))?;
    }
    if let Some(child) = child {
        child.ready().map_err(failed("cannot go to the background"))?;
    }
    let served = serve(args, &server, &listener, name);
    if let Some(path) = &args.pid_file {
        // It says that nobody is there any more.
        let _ = std::fs::remove_file(path);
    }
    served?;
    node.flush().map_err(failed("error while flushing the image"))
}

fn serve(args: &Args, server: &Arc<Server>, listener: &Listener, name: &'static str) -> Result<()> {
    let daemon = Arc::new(Daemon::new().map_err(failed("cannot wait for signals"))?);
    let mut threads = Vec::new();
    let mut started = 0usize;
    loop {
        let room = args.shared == 0 || daemon.clients() < args.shared;
        match daemon.wait(room.then_some(listener)).map_err(failed("cannot wait for clients"))? {
            Event::Stop => break,
            Event::Gone if !args.persistent && server.served() != 0 && daemon.clients() == 0 => break,
            Event::Gone => continue,
            Event::Client => {}
        }
        let socket = match listener.accept() {
            Ok(socket) => socket,
            // It went again before it was looked at.
            Err(_) => continue,
        };
        let guest = daemon.enter();
        let (server, verbose) = (Arc::clone(server), args.verbose);
        started += 1;
        let body = Box::new(move || {
            if let Err(error) = server.serve(socket)
                && verbose
            {
                eprintln!("{name}: {}", errno(&error));
            }
            drop(guest);
        });
        threads.retain(|t: &std::thread::JoinHandle<()>| !t.is_finished());
        threads.push(
            PlainSpawner
                .spawn(&format!("nbd{started}"), Role::Block, body)
                .map_err(failed("cannot start a thread"))?,
        );
    }
    server.disconnect_all();
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn tls_server(args: &Args) -> Result<Option<Arc<ServerConfig>>> {
    let Some(id) = &args.tls_creds else { return Ok(None) };
    let config = objects().tls(id).and_then(|t| t.server());
    config.map(Some).map_err(|e| ImgError::Refused(e.to_string()))
}

fn open(args: &Args) -> Result<Arc<dyn BlockNode>> {
    let Some(name) = &args.filename else { return refused("Expecting an image: one filename argument") };
    let cache = match (&args.cache, args.nocache) {
        (Some(_), true) => return refused("-n and --cache can only be specified once"),
        (None, true) => "none",
        (Some(mode), false) => mode,
        (None, false) => "writeback",
    };
    let detect_zeroes = detect_zeroes(args)?;
    if check_aio(args.aio.as_deref(), cache, |mode| format!("Invalid aio mode '{mode}'"), name)? == Some(true)
    {
        return refused("--aio=io_uring: requests of clients are carried out by threads");
    }
    let source = Source {
        image_opts: args.image_opts,
        cache: Some(cache),
        detect_zeroes,
        ..Source::new(name, args.format.as_deref())
    };
    let readonly = args.read_only || args.load_snapshot.is_some();
    let mut opener = source.opener(!readonly && !args.snapshot)?;
    opener.discard = matches!(args.discard.as_str(), "unmap" | "on");
    let mut node = source.open_with(&opener)?;
    if let Some(key) = &args.load_snapshot {
        node = crate::convert::at_snapshot(&node, name, key)?;
    }
    if args.snapshot && args.load_snapshot.is_none() {
        node = overlay(node, args.read_only)?;
    }
    if let Some(offset) = &args.offset {
        let offset = size_argument(offset, "offset")?;
        let part = RawFormat::new(node, offset, None, readonly);
        node =
            part.map_err(|source| ImgError::Image { what: "Could not open", name: name.clone(), source })?;
    }
    Ok(node)
}

/// What `--detect-zeroes` says.
fn detect_zeroes(args: &Args) -> Result<Option<DetectZeroes>> {
    match args.detect_zeroes.as_deref() {
        None => Ok(None),
        Some("off") => Ok(Some(DetectZeroes::Off)),
        Some("on") => Ok(Some(DetectZeroes::On)),
        Some("unmap") if matches!(args.discard.as_str(), "unmap" | "on") => Ok(Some(DetectZeroes::Unmap)),
        Some("unmap") => refused(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        Some(other) => refused(format!("Failed to parse detect_zeroes mode: Invalid parameter '{other}'")),
    }
}

fn bitmap(node: &Arc<dyn BlockNode>, name: &str, readonly: bool) -> Result<Arc<BitmapContext>> {
    let mut next = Some(Arc::clone(node));
    while let Some(node) = next {
        let found = node.as_qcow2().and_then(|q| q.bitmaps().into_iter().find(|b| b.name == name));
        match found {
            Some(bitmap) if bitmap.inconsistent => {
                return refused(format!("Bitmap '{name}' is inconsistent and cannot be used"));
            }
            Some(bitmap) if bitmap.enabled && !readonly => {
                return refused(format!(
                    "Bitmap '{name}' is recording: it can be offered by an export that is read-only (-r)"
                ));
            }
            Some(bitmap) => return Ok(Arc::new(BitmapContext { bitmap })),
            None => next = node.backing(),
        }
    }
    refused(format!("Bitmap '{name}' is not found"))
}

fn show_exports(args: &Args) -> Result<()> {
    if args.filename.is_some() {
        return refused("List mode is incompatible with a file name");
    }
    let address = address(args);
    let tls = match &args.tls_creds {
        None if args.tls_hostname.is_some() => return refused("--tls-hostname needs --tls-creds"),
        None => None,
        Some(id) => {
            let config = objects().tls(id).and_then(|t| t.client());
            let config = config.map_err(|e| ImgError::Refused(e.to_string()))?;
            let hostname = match (&args.tls_hostname, &address) {
                (Some(name), _) | (None, Address::Tcp(name, _)) => name.clone(),
                (None, Address::Unix(_)) => {
                    return refused("--tls-hostname is needed for TLS over a UNIX socket");
                }
            };
            Some(TlsClient { config, hostname })
        }
    };
    let exports = list(&address, tls).map_err(|e: io::Error| {
        ImgError::Refused(format!("Failed to list the exports of '{address}': {}", errno(&e)))
    })?;
    let mut out = format!("exports available: {}\n", exports.len());
    for export in &exports {
        out += &format!(" export: '{}'\n", export.name);
        if let Some(text) = &export.description {
            out += &format!("  description: {text}\n");
        }
        if export.flags & transmission::HAS_FLAGS != 0 {
            let names = transmission::NAMES.iter().filter(|(bit, _)| export.flags & bit != 0);
            let names: String = names.map(|(_, name)| format!("{name} ")).collect();
            out += &format!("  size:  {}\n  flags: {:#x} ( {names})\n", export.size, export.flags);
        }
        if let Some((min, opt, max)) = export.block {
            out += &format!("  min block: {min}\n  opt block: {opt}\n  max block: {max}\n");
        }
        // Extended headers, which have 64-bit lengths, are not asked for.
        out += "  transaction size: 32-bit\n";
        if !export.contexts.is_empty() {
            out += &format!("  available meta contexts: {}\n", export.contexts.len());
            export.contexts.iter().for_each(|c| out += &format!("   {c}\n"));
        }
    }
    print(&out)
}
