//! The commands.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use holdfast_block::{BlockNode, Preallocation};

use super::Args;
use super::flight::{Flight, Shape};
use super::parse::{Words, bytes, number, pattern, split};
use crate::common::{Result, Source, check_aio, errno, overlay, refused};

/// Longest transfer, in bytes.
const MAX_TRANSFER: u64 = 1 << 31;
/// Alignment of memory, enough for direct I/O, and what `-m` adds to spoil it.
const ALIGN: usize = 4096;
const MISALIGN: usize = 16;

/// Name, other name, least and most arguments (`None` for any), arguments, meaning.
type Help = (&'static str, &'static str, usize, Option<usize>, &'static str, &'static str);

const COMMANDS: &[Help] = &[
    ("aio_flush", "", 0, Some(0), "", "completes all outstanding aio requests"),
    (
        "aio_read",
        "",
        2,
        None,
        "[-Ciqv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
    ),
    (
        "aio_write",
        "",
        2,
        None,
        "[-Cfiquz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
    ),
    ("alloc", "a", 1, Some(2), "offset [count]", "checks if offset is allocated in the file"),
    ("close", "c", 0, Some(0), "", "close the current open file"),
    ("discard", "d", 2, None, "[-Cq] off len", "discards a number of bytes at a specified offset"),
    ("flush", "f", 0, Some(0), "", "flush all in-core file state to disk"),
    ("help", "?", 0, Some(1), "[command]", "help for one or all commands"),
    ("length", "l", 0, Some(0), "", "gets the length of the current file"),
    ("map", "", 0, Some(0), "", "prints the allocated areas of a file"),
    (
        "open",
        "o",
        1,
        None,
        "[-rsnCkU] [-t cache] [-i aio] [-d discard] path",
        "open the file specified by path",
    ),
    ("quit", "q", 0, Some(0), "", "exit the program"),
    (
        "read",
        "r",
        2,
        None,
        "[-Cqv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
    ),
    (
        "readv",
        "",
        2,
        None,
        "[-Cqv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
    ),
    ("sleep", "", 1, Some(1), "", "waits for the given value in milliseconds"),
    ("truncate", "t", 1, None, "[-m prealloc_mode] off", "truncates the current file at the given offset"),
    (
        "write",
        "w",
        2,
        None,
        "[-cCfquz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
    ),
    (
        "writev",
        "",
        2,
        None,
        "[-Cfq] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
    ),
];

/// What comes after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Command,
    Quit,
}

/// The open image, and whether something has failed.
#[derive(Debug, Default)]
pub(super) struct Session {
    node: Option<Arc<dyn BlockNode>>,
    /// Requests of `aio_` commands.
    flight: Option<Flight>,
    /// What is read from a backing file is written to the image.
    copy_on_read: bool,
    /// Memory is not aligned.
    misalign: bool,
    pub(super) failed: bool,
}

/// How an image is opened, besides its name and cache mode.
struct How<'a> {
    readonly: bool,
    snapshot: bool,
    copy_on_read: bool,
    discard: bool,
    aio: Option<&'a str>,
}

/// How a transfer is reported.
pub(super) struct Report {
    pub(super) what: &'static str,
    pub(super) offset: u64,
    pub(super) total: u64,
    pub(super) took: u64,
    pub(super) condensed: bool,
}

impl Report {
    pub(super) fn show(&self) {
        let seconds = (self.took as f64 / 1e9).max(1e-9);
        let (rate, ops) = (self.total as f64 / seconds, 1.0 / seconds);
        if self.condensed {
            let (minutes, rest) = ((seconds / 60.0) as u64, seconds % 60.0);
            println!("{},1,{}:{:02}:{rest:05.2},{rate:.3},{ops:.3}", self.total, minutes / 60, minutes % 60);
            return;
        }
        println!("{} {}/{} bytes at offset {}", self.what, self.total, self.total, self.offset);
        println!(
            "{}, 1 ops; {seconds:05.2} sec ({}/sec and {ops:.4} ops/sec)",
            bytes(self.total as f64),
            bytes(rate)
        );
    }
}

pub(super) fn dump(data: &[u8], offset: u64) {
    for (n, line) in data.chunks(16).enumerate() {
        let mut text = format!("{:08x}:  ", offset + n as u64 * 16);
        line.iter().for_each(|b| text += &format!("{b:02x} "));
        text.push(' ');
        text.extend(
            line.iter().map(|b| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '.' }),
        );
        println!("{text}");
    }
}

fn run_result(result: std::result::Result<(), String>) -> bool {
    match result {
        Ok(()) => true,
        Err(text) if text.is_empty() => false,
        Err(text) => {
            println!("{text}");
            false
        }
    }
}

impl Session {
    /// Opens an image.
    pub(super) fn open(&mut self, file: &str, args: &Args) -> Result<()> {
        let source = Source {
            image_opts: args.image_opts,
            share: args.force_share,
            cache: args.cache.as_deref().or(args.nocache.then_some("none")),
            ..Source::new(file, args.format.as_deref())
        };
        self.misalign = args.misalign;
        let how = How {
            readonly: args.read_only,
            snapshot: args.snapshot,
            copy_on_read: args.copy_on_read,
            discard: matches!(args.discard.as_str(), "unmap" | "on"),
            aio: args.native_aio.then_some("native").or(args.aio.as_deref()),
        };
        self.open_how(&source, &how)
    }

    fn open_how(&mut self, source: &Source<'_>, how: &How<'_>) -> Result<()> {
        let cache = source.cache.unwrap_or("writeback");
        let uring = check_aio(how.aio, cache, |mode| format!("Invalid aio option: {mode}"), source.name)?;
        if how.copy_on_read && how.readonly {
            return refused(format!(
                "can't open device {}: Can't use copy-on-read on read-only device",
                source.name
            ));
        }
        let mut opener = source.opener(!how.readonly && !how.snapshot)?;
        opener.discard = how.discard;
        opener.io_uring = uring != Some(false);
        let mut node = source.open_with(&opener)?;
        if how.snapshot {
            node = overlay(node, how.readonly)?;
        }
        self.copy_on_read = how.copy_on_read;
        self.node = Some(node);
        Ok(())
    }

    /// Requests under way, from the first `aio_` command on.
    fn flight(&mut self) -> std::result::Result<&mut Flight, String> {
        if self.flight.is_none()
            && let Some(node) = &self.node
        {
            self.flight = Some(Flight::new(Arc::clone(node))?);
        }
        self.flight.as_mut().ok_or_else(String::new)
    }

    /// Waits for all that is under way.
    fn drain(&mut self) {
        if let Some(flight) = &mut self.flight {
            flight.drain();
        }
    }

    /// Lets the image go, with what is only in memory written.
    pub(super) fn close(&mut self) {
        self.drain();
        self.flight = None;
        if let Some(node) = self.node.take()
            && !node.is_readonly()
            && let Err(error) = node.flush()
        {
            println!("flush failed: {}", errno(&error));
            self.failed = true;
        }
    }

    /// Carries out a line.
    pub(super) fn run(&mut self, line: &str) -> Next {
        let words = split(line);
        let Some((name, rest)) = words.split_first() else { return Next::Command };
        let Some(command) = COMMANDS.iter().find(|c| c.0 == name || (!c.1.is_empty() && c.1 == name)) else {
            println!("command \"{name}\" not found");
            self.failed = true;
            return Next::Command;
        };
        let (name, _, least, most, ..) = *command;
        if rest.len() < least || most.is_some_and(|m| rest.len() > m) {
            match most {
                Some(most) if least == most => {
                    println!("bad argument count {} to {name}, expected {least} arguments", rest.len());
                }
                Some(most) => println!(
                    "bad argument count {} to {name}, expected between {least} and {most} arguments",
                    rest.len()
                ),
                None => {
                    println!(
                        "bad argument count {} to {name}, expected at least {least} arguments",
                        rest.len()
                    );
                }
            }
            self.failed = true;
            return Next::Command;
        }
        if name == "quit" {
            return Next::Quit;
        }
        if !run_result(self.command(name, rest)) {
            self.failed = true;
        }
        if let Some(flight) = &mut self.flight {
            flight.reap();
        }
        Next::Command
    }

    fn command(&mut self, name: &str, rest: &[String]) -> std::result::Result<(), String> {
        match name {
            "help" => return help(rest.first().map(String::as_str)),
            "open" => return self.reopen(rest),
            "sleep" => {
                let time = number(rest.first().map(String::as_str).unwrap_or_default(), "sleep")?;
                std::thread::sleep(Duration::from_millis(time));
                return Ok(());
            }
            _ => {}
        }
        let Some(node) = self.node.clone() else {
            eprintln!("no file open, try 'help open'");
            return Err(String::new());
        };
        let node = &*node;
        match name {
            "aio_read" => return self.aio_read(node, rest),
            "aio_write" => return self.aio_write(node, rest),
            "aio_flush" | "truncate" => self.drain(),
            _ => {}
        }
        match name {
            "close" => {
                self.close();
                Ok(())
            }
            "read" | "readv" => self.read(node, rest, name),
            "write" | "writev" => self.write(node, rest, name),
            "aio_flush" => Ok(()),
            "flush" => node.flush().map_err(|e| format!("flush failed: {}", errno(&e))),
            "discard" => discard(node, rest),
            "truncate" => truncate(node, rest),
            "length" => {
                println!("{}", bytes(node.size() as f64));
                Ok(())
            }
            "map" => map(node),
            _ => alloc(node, rest),
        }
    }

    fn reopen(&mut self, rest: &[String]) -> std::result::Result<(), String> {
        if self.node.is_some() {
            return Err("file open already, try 'help close'".to_owned());
        }
        let words = Words::new(rest, "rsnCkU", "tid")?;
        let [file] = words.rest.as_slice() else { return Err("bad argument count to open".to_owned()) };
        let cache = words.value('t').or(words.has('n').then_some("none"));
        let source = Source { share: words.has('U'), cache, ..Source::new(file, None) };
        let how = How {
            readonly: words.has('r'),
            snapshot: words.has('s'),
            copy_on_read: words.has('C'),
            discard: match words.value('d') {
                None | Some("ignore" | "off") => false,
                Some("unmap" | "on") => true,
                Some(other) => return Err(format!("Invalid discard option: {other}")),
            },
            aio: words.has('k').then_some("native").or(words.value('i')),
        };
        self.open_how(&source, &how).map_err(|e| e.to_string())
    }

    /// Memory for a transfer, and where it starts there.
    fn memory(&self, len: u64) -> (Vec<u8>, usize) {
        let skip = if self.misalign { MISALIGN } else { 0 };
        let memory: Vec<u8> = vec![0; len as usize + skip + ALIGN];
        let aligned = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        (memory, aligned + skip)
    }

    fn aio_read(&mut self, node: &dyn BlockNode, rest: &[String]) -> std::result::Result<(), String> {
        let words = Words::new(rest, "Ciqv", "P")?;
        let (offset, len) = extent(&words)?;
        let pattern = words.value('P').map(pattern).transpose()?;
        if words.has('i') {
            // It counts as a request that could not be done, and is none.
            return Ok(());
        }
        if let Err(error) = within(node, offset, len).and_then(|()| self.fetch(node, offset, len)) {
            println!("readv failed: {}", errno(&error));
            return Ok(());
        }
        let (memory, start) = self.memory(len);
        let shape = Shape { quiet: words.has('q'), dump: words.has('v'), condensed: words.has('C'), pattern };
        self.flight()?.read((offset, len), (memory, start), shape);
        Ok(())
    }

    fn aio_write(&mut self, node: &dyn BlockNode, rest: &[String]) -> std::result::Result<(), String> {
        let words = Words::new(rest, "Cfiquz", "P")?;
        check_zero_flags(&words)?;
        let (offset, len) = extent(&words)?;
        if words.has('i') {
            return Ok(());
        }
        if let Err(error) = within(node, offset, len) {
            println!("aio_write failed: {}", errno(&error));
            return Ok(());
        }
        let zeroes = words.has('z').then(|| words.has('u'));
        let (mut memory, start) = self.memory(if zeroes.is_some() { 0 } else { len });
        memory.fill(words.value('P').map_or(Ok(0xcd), pattern)?);
        let shape = Shape { quiet: words.has('q'), dump: false, condensed: words.has('C'), pattern: None };
        self.flight()?.write((offset, len), (memory, start), (zeroes, words.has('f')), shape);
        Ok(())
    }

    /// With copy-on-read: has the image keep what its backing file has of a range.
    fn fetch(&self, node: &dyn BlockNode, offset: u64, len: u64) -> io::Result<()> {
        if !self.copy_on_read || node.backing().is_none() {
            return Ok(());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let extent = node.status(at, end - at)?;
            let len = extent.len.clamp(1, end - at);
            if !extent.allocated {
                let mut data = vec![0; len as usize];
                node.read_at(at, &mut data)?;
                node.write_at(at, &data)?;
            }
            at += len;
        }
        Ok(())
    }
}

fn help(name: Option<&str>) -> std::result::Result<(), String> {
    for (command, other, _, _, args, text) in COMMANDS {
        match name {
            Some(name) if *command != name && *other != name => continue,
            _ => println!("{command} {args}{}-- {text}", if args.is_empty() { "" } else { " " }),
        }
    }
    match name {
        Some(name) if !COMMANDS.iter().any(|c| c.0 == name || c.1 == name) => {
            Err(format!("command {name} not found"))
        }
        _ => Ok(()),
    }
}

/// The offset, and the sum of the lengths.
fn extent(words: &Words) -> std::result::Result<(u64, u64), String> {
    let offset = words.number(0, "offset")?;
    let mut len = 0u64;
    for n in 1..words.rest.len() {
        len = len.saturating_add(words.number(n, "length")?);
    }
    if words.rest.len() < 2 {
        return Err(format!("bad argument count {}, an offset and a length are expected", words.rest.len()));
    }
    if len > MAX_TRANSFER {
        return Err(format!("length cannot exceed {MAX_TRANSFER}, given {len}"));
    }
    Ok((offset, len))
}

/// Checked here: nodes trust their callers.
fn within(node: &dyn BlockNode, offset: u64, len: u64) -> io::Result<()> {
    let end = offset.checked_add(len).filter(|e| *e <= node.size());
    end.map(|_| ()).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
}

fn timed<T>(work: impl FnOnce() -> io::Result<T>) -> (io::Result<T>, u64) {
    let before = holdfast_clock::host_monotonic();
    let result = work();
    (result, holdfast_clock::host_monotonic().saturating_sub(before))
}

impl Session {
    fn read(&self, node: &dyn BlockNode, rest: &[String], name: &str) -> std::result::Result<(), String> {
        let words = Words::new(rest, "Cqv", if name == "read" { "Psl" } else { "P" })?;
        let (offset, len) = extent(&words)?;
        let (mut memory, start) = self.memory(len);
        let data = memory.get_mut(start..start + len as usize).unwrap_or_default();
        let (result, took) = timed(|| {
            within(node, offset, len)?;
            self.fetch(node, offset, len)?;
            node.read_at(offset, data)
        });
        result.map_err(|e| format!("{name} failed: {}", errno(&e)))?;
        let mut verified = true;
        if let Some(byte) = words.value('P').map(pattern).transpose()? {
            let from = words.value('s').map_or(Ok(0), |t| number(t, "pattern offset"))?;
            let count =
                words.value('l').map_or(Ok(len.saturating_sub(from)), |t| number(t, "pattern length"))?;
            let end = from.checked_add(count).filter(|e| *e <= len);
            let end = end.ok_or("pattern verification range exceeds end of read data")?;
            let part = data.get(from as usize..end as usize).unwrap_or_default();
            if part.iter().any(|b| *b != byte) {
                println!("Pattern verification failed at offset {}, {count} bytes", offset + from);
                verified = false;
            }
        }
        if !words.has('q') {
            if words.has('v') {
                dump(data, offset);
            }
            Report { what: "read", offset, total: len, took, condensed: words.has('C') }.show();
        }
        if verified { Ok(()) } else { Err(String::new()) }
    }

    fn write(&self, node: &dyn BlockNode, rest: &[String], name: &str) -> std::result::Result<(), String> {
        let words = Words::new(rest, if name == "write" { "cCfquz" } else { "Cfquz" }, "Ps")?;
        check_zero_flags(&words)?;
        if words.has('c') && words.has('z') {
            return Err("-c and -z cannot be specified at the same time".to_owned());
        }
        let (offset, len) = extent(&words)?;
        let (mut memory, start) = self.memory(if words.has('z') { 0 } else { len });
        let data = memory.get_mut(start..start + len as usize).unwrap_or_default();
        match (words.value('s'), words.value('P')) {
            _ if words.has('z') => {}
            (Some(_), Some(_)) => {
                return Err("Only one of -P and -s can be specified at the same time".to_owned());
            }
            (Some(file), None) => {
                let source = std::fs::read(file).map_err(|e| format!("{file}: {}", errno(&e)))?;
                if source.is_empty() {
                    return Err(format!("{file}: file is empty"));
                }
                data.iter_mut().zip(source.iter().cycle()).for_each(|(to, from)| *to = *from);
            }
            (None, byte) => data.fill(byte.map_or(Ok(0xcd), pattern)?),
        }
        let (result, took) = timed(|| {
            within(node, offset, len)?;
            if words.has('z') {
                node.write_zeroes(offset, len, words.has('u'))?;
            } else if words.has('c') {
                let image = node.as_qcow2().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTSUP))?;
                image.write_compressed(offset, data)?;
            } else {
                node.write_at(offset, data)?;
            }
            if words.has('f') { node.flush() } else { Ok(()) }
        });
        result.map_err(|e| format!("{name} failed: {}", errno(&e)))?;
        if !words.has('q') {
            Report { what: "wrote", offset, total: len, took, condensed: words.has('C') }.show();
        }
        Ok(())
    }
}

fn check_zero_flags(words: &Words) -> std::result::Result<(), String> {
    if words.has('z') && (words.value('P').is_some() || words.value('s').is_some()) {
        return Err("-z and -P, -s cannot be specified at the same time".to_owned());
    }
    if words.has('u') && !words.has('z') {
        return Err("-u requires -z to be specified".to_owned());
    }
    Ok(())
}

fn discard(node: &dyn BlockNode, rest: &[String]) -> std::result::Result<(), String> {
    let words = Words::new(rest, "Cq", "")?;
    let (offset, len) = extent(&words)?;
    let (result, took) = timed(|| within(node, offset, len).and_then(|()| node.discard(offset, len)));
    result.map_err(|e| format!("discard failed: {}", errno(&e)))?;
    if !words.has('q') {
        Report { what: "discard", offset, total: len, took, condensed: words.has('C') }.show();
    }
    Ok(())
}

fn truncate(node: &dyn BlockNode, rest: &[String]) -> std::result::Result<(), String> {
    let words = Words::new(rest, "", "m")?;
    let size = words.number(0, "truncate")?;
    let how = words.value('m').map_or(Some(Preallocation::Off), Preallocation::from_name);
    let how = how.ok_or("the preallocation mode is not known")?;
    node.truncate(size, how).map_err(|e| errno(&e))
}

/// Runs that this node has itself, or has not: offset, length, which.
fn runs(node: &dyn BlockNode, from: u64, to: u64) -> std::result::Result<Vec<(u64, u64, bool)>, String> {
    let mut out: Vec<(u64, u64, bool)> = Vec::new();
    let mut at = from;
    while at < to {
        let extent = node
            .status(at, to - at)
            .map_err(|e| format!("Failed to get allocation status: {}", errno(&e)))?;
        let len = extent.len.clamp(1, to - at);
        match out.last_mut() {
            Some((_, sum, allocated)) if *allocated == extent.allocated => *sum += len,
            _ => out.push((at, len, extent.allocated)),
        }
        at += len;
    }
    Ok(out)
}

fn map(node: &dyn BlockNode) -> std::result::Result<(), String> {
    for (offset, len, allocated) in runs(node, 0, node.size())? {
        let what = if allocated { "    allocated" } else { "not allocated" };
        let (size, at) = (bytes(len as f64), bytes(offset as f64));
        println!("{size} ({len:#x}) bytes {what} at offset {at} ({offset:#x})");
    }
    Ok(())
}

fn alloc(node: &dyn BlockNode, rest: &[String]) -> std::result::Result<(), String> {
    let words = Words::new(rest, "", "")?;
    let offset = words.number(0, "offset")?;
    let count = if words.rest.len() > 1 { words.number(1, "count")? } else { 512 };
    within(node, offset, count).map_err(|e| format!("is_allocated failed: {}", errno(&e)))?;
    let sum: u64 = runs(node, offset, offset + count)?.iter().filter(|r| r.2).map(|r| r.1).sum();
    println!("{sum}/{count} bytes allocated at offset {}", bytes(offset as f64));
    Ok(())
}
