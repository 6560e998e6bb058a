//! Jobs without a VM: nodes in memory, a thread, and a monitor that hears events.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use holdfast_block::graph::Opener;
use holdfast_block::nodes::{Hold, NamedNode, Nodes, User};
use holdfast_block::{BlockError, BlockNode};
use holdfast_config::BlockdevOptions;
use holdfast_threads::PlainSpawner;
use holdfast_virtio::blk::log::WriteLog;

use super::mirror::{Mirror, MirrorOptions, MirroredDevice};
use super::*;
use crate::control::TimedEvent;

const SIZE: u64 = 8 << 20;

#[derive(Debug, Default)]
struct Told {
    quiet: AtomicU64,
    released: AtomicU64,
    pivoted: AtomicBool,
}

/// A guest's disk: while it is quiet it writes once more, as a request does that was under way.
struct Device {
    told: Arc<Told>,
    source: Arc<NamedNode>,
    log: Arc<WriteLog>,
}

impl MirroredDevice for Device {
    fn quiesce(&self) -> Result<(), String> {
        self.told.quiet.fetch_add(1, Ordering::SeqCst);
        write(&self.source, &self.log, 4096, 0x77);
        Ok(())
    }
    fn pivot(&self, target: Hold) -> Result<(), String> {
        self.told.pivoted.store(true, Ordering::SeqCst);
        drop(target);
        Ok(())
    }
    fn release(&self) {
        self.told.released.fetch_add(1, Ordering::SeqCst);
    }
}

fn write(node: &NamedNode, log: &WriteLog, at: u64, byte: u8) {
    log.mark(at, 512);
    node.write_at(at, &[byte; 512]).expect("written");
    log.mark(at, 512);
}

struct Rig {
    nodes: Arc<Nodes>,
    _dir: tempfile::TempDir,
    told: Arc<Told>,
    log: Arc<WriteLog>,
    job: Arc<Job>,
    events: Receiver<Arc<TimedEvent>>,
    thread: Option<JoinHandle<()>>,
}

fn options(json: &str) -> MirrorOptions {
    let mut all = serde_json::json!({ "device": "a", "target": "b", "sync": "full" });
    let more: serde_json::Value = serde_json::from_str(json).expect("JSON");
    for (key, value) in more.as_object().expect("an object") {
        all[key] = value.clone();
    }
    serde_json::from_value(all).expect("options")
}

impl Rig {
    /// Mirrors `a` (half of it zeroes) to `b`.
    fn start(more: &str) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let nodes = Nodes::new(Arc::new(super::super::Nobody));
        let mut bytes = vec![0x11; SIZE as usize / 2];
        bytes.resize(SIZE as usize, 0);
        std::fs::write(dir.path().join("a"), bytes).expect("file");
        std::fs::write(dir.path().join("b"), vec![0x99; SIZE as usize]).expect("file");
        for name in ["a", "b"] {
            let text = format!("driver=file,node-name={name},filename={}/{name}", dir.path().display());
            let given = BlockdevOptions::from_pairs(&text).expect("options");
            let opener = Opener {
                writable: true,
                nodes: Some(Arc::clone(&nodes)),
                name: name.to_owned(),
                ..Opener::reading(PlainSpawner::shared())
            };
            nodes.add(&given, &opener).expect("a node");
        }
        let options = options(more);
        options.check().expect("good options");
        let bus = EventBus::new();
        let events = bus.subscribe();
        let made = JobOptions {
            id: "job0".to_owned(),
            speed: options.speed.unwrap_or(0),
            auto_finalize: options.auto_finalize.unwrap_or(true),
            auto_dismiss: options.auto_dismiss.unwrap_or(true),
        };
        let job = Job::start(made, bus).expect("a job");
        let hold = |name, writes| {
            let user = User { who: "job".to_owned(), role: "root", writes, shares_write: !writes };
            nodes.find(name).expect("there").hold(user).expect("held")
        };
        let log = Arc::new(options.log(SIZE).expect("a log"));
        let holds = (hold("a", false), hold("b", true));
        let source = nodes.find("a").expect("there");
        let told = Arc::<Told>::default();
        let mirror = Mirror::new(Arc::clone(&job), holds, Arc::clone(&log), &options);
        let device = Device { told: Arc::clone(&told), source, log: Arc::clone(&log) };
        let thread = Some(std::thread::spawn(move || mirror.run(Box::new(device))));
        Self { nodes, _dir: dir, told, log, job, events, thread }
    }

    /// The events up to the one that has `word` in it, each as its name or the status.
    fn until(&self, word: &str) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let event = self.events.recv_timeout(Duration::from_secs(20)).expect("an event");
            let (name, data) = event.event.qmp().expect("QMP");
            let data = data.unwrap_or_default();
            let said = data["status"].as_str().unwrap_or(name).to_owned();
            all.push(said.clone());
            if said == word {
                return all;
            }
        }
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let node = self.nodes.find(name).expect("there");
        let mut all = vec![0; node.size() as usize];
        node.read_at(0, &mut all).expect("read");
        all
    }

    fn end(&mut self) {
        self.thread.take().expect("a thread").join().expect("no panic");
        assert_eq!(self.told.released.load(Ordering::SeqCst), 1);
        // Nobody uses the nodes any more.
        self.nodes.remove("a").expect("free");
        self.nodes.remove("b").expect("free");
    }
}

#[test]
fn a_job_that_is_cancelled_when_it_is_ready_leaves_a_copy() {
    let mut rig = Rig::start(r#"{"auto-dismiss": false}"#);
    assert_eq!(rig.until("BLOCK_JOB_READY"), ["created", "running", "ready", "BLOCK_JOB_READY"]);
    let info = rig.job.block_info();
    assert!(info.ready && info.len == SIZE && info.offset == SIZE, "{info:?}");
    let source = rig.nodes.find("a").expect("there");
    write(&source, &rig.log, 5 << 20, 0x22);
    rig.job.ask(JobVerb::Cancel { force: false }).expect("cancelled");
    let ends = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded"];
    assert_eq!(rig.until("concluded"), ends);
    let (a, b) = (rig.bytes("a"), rig.bytes("b"));
    assert_eq!((a[5 << 20], a[4096]), (0x22, 0x77));
    assert!(a == b, "the target is not like the source");
    assert!(!rig.told.pivoted.load(Ordering::SeqCst));
    let error = rig.job.ask(JobVerb::Pause).expect_err("over");
    assert_eq!(error.to_string(), "Job 'job0' in state 'concluded' cannot accept command verb 'pause'");
    drop(source);
    rig.job.ask(JobVerb::Dismiss).expect("forgotten");
    assert_eq!(rig.until("null"), ["null"]);
    rig.end();
}

#[test]
fn a_job_that_is_completed_lets_the_disk_go_over() {
    let mut rig = Rig::start(r#"{"auto-finalize": false}"#);
    rig.until("BLOCK_JOB_READY");
    rig.job.ask(JobVerb::Pause).expect("pauses");
    assert_eq!(rig.until("standby"), ["standby"]);
    assert_eq!(rig.job.ask(JobVerb::Pause).expect_err("twice").to_string(), "Job is already paused");
    rig.job.ask(JobVerb::Complete).expect("may be completed");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(rig.told.quiet.load(Ordering::SeqCst), 0, "it stands");
    rig.job.ask(JobVerb::Resume).expect("goes on");
    assert_eq!(rig.until("BLOCK_JOB_PENDING"), ["ready", "waiting", "pending", "BLOCK_JOB_PENDING"]);
    assert!(!rig.told.pivoted.load(Ordering::SeqCst), "it waits for job-finalize");
    rig.job.ask(JobVerb::Finalize).expect("finalized");
    assert_eq!(rig.until("null"), ["BLOCK_JOB_COMPLETED", "concluded", "null"]);
    assert!(rig.told.pivoted.load(Ordering::SeqCst));
    assert!(rig.bytes("a") == rig.bytes("b"), "the target is not like the source");
    rig.end();
}

#[test]
fn a_slow_job_is_paused_and_cancelled_in_the_middle() {
    let mut rig = Rig::start(r#"{"speed": 1048576, "buf-size": 65536}"#);
    rig.until("running");
    let error = rig.job.ask(JobVerb::Complete).expect_err("not ready");
    assert_eq!(error.to_string(), "Job 'job0' in state 'running' cannot accept command verb 'complete'");
    assert_eq!(
        rig.job.ask(JobVerb::Resume).expect_err("runs").to_string(),
        "Can't resume a job that was not paused"
    );
    rig.job.ask(JobVerb::Pause).expect("pauses");
    assert_eq!(rig.until("paused"), ["paused"]);
    let before = rig.job.info();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(rig.job.info(), before, "it stands");
    assert!(before.current_progress < SIZE / 2, "{before:?}");
    rig.job.ask(JobVerb::Resume).expect("goes on");
    rig.until("running");
    rig.job.ask(JobVerb::Cancel { force: false }).expect("cancelled");
    assert_eq!(rig.until("null"), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    assert!(rig.bytes("a") != rig.bytes("b"));
    assert_eq!(rig.told.quiet.load(Ordering::SeqCst), 0);
    rig.end();
}

#[test]
fn the_speed_is_kept_to_and_can_be_changed() {
    let mut rig = Rig::start(r#"{"speed": 2097152, "buf-size": 131072}"#);
    let begun = Instant::now();
    assert!(rig.job.ask(JobVerb::SetSpeed(-1)).is_err());
    std::thread::sleep(Duration::from_millis(500));
    let done = rig.job.info().current_progress;
    assert!((1 << 18..2 << 20).contains(&done), "{done} bytes in {:?}", begun.elapsed());
    rig.job.ask(JobVerb::SetSpeed(0)).expect("no limit");
    rig.until("BLOCK_JOB_READY");
    assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
    rig.job.ask(JobVerb::Cancel { force: true }).expect("cancelled");
    rig.until("BLOCK_JOB_CANCELLED");
    rig.end();
}

#[test]
fn an_error_of_the_target_ends_the_job() {
    let mut rig = Rig::start("{}");
    rig.until("BLOCK_JOB_READY");
    // It is another process's from now on.
    rig.nodes
        .find("b")
        .and_then(|b| b.inactivate().map_err(|e| BlockError::Option(e.to_string())))
        .expect("given up");
    let source = rig.nodes.find("a").expect("there");
    write(&source, &rig.log, 0, 0x44);
    drop(source);
    let all = rig.until("null");
    let ends = ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"];
    assert_eq!(all, ends);
    assert!(rig.job.info().error.is_some_and(|e| !e.contains("os error")));
    rig.end();
}

#[test]
fn only_what_is_written_is_copied_if_that_is_asked_for() {
    let mut rig = Rig::start(r#"{"sync": "none", "granularity": 4096}"#);
    rig.until("BLOCK_JOB_READY");
    let source = rig.nodes.find("a").expect("there");
    write(&source, &rig.log, 1 << 20, 0x33);
    drop(source);
    rig.job.ask(JobVerb::Cancel { force: false }).expect("cancelled");
    rig.until("null");
    let b = rig.bytes("b");
    assert_eq!((b[1 << 20], b[(1 << 20) + 512], b[(1 << 20) + 4096]), (0x33, 0x11, 0x99));
    rig.end();
}

#[test]
fn what_is_not_supported_is_named() {
    let refused = |more: &str| options(more).check().expect_err(more).describe();
    assert_eq!(refused(r#"{"sync": "incremental"}"#), "Sync mode 'incremental' not supported");
    assert!(refused(r#"{"copy-mode": "write-blocking"}"#).contains("'write-blocking' is not supported"));
    assert!(refused(r#"{"on-target-error": "ignore"}"#).contains("'on-target-error'"));
    assert!(refused(r#"{"on-source-error": "stop"}"#).contains("'on-source-error'"));
    assert!(refused(r#"{"filter-node-name": "f"}"#).contains("'filter-node-name'"));
    assert!(refused(r#"{"buf-size": -1}"#).contains("'buf-size'"));
    let range = "Parameter 'granularity' expects a value in range [512B, 64MB]";
    assert_eq!(refused(r#"{"granularity": 7}"#), range);
    assert_eq!(refused(r#"{"granularity": 134217728}"#), range);
    assert_eq!(refused(r#"{"granularity": 1000}"#), "Parameter 'granularity' expects a power of 2");
    assert!(options(r#"{"granularity": 512}"#).log(1 << 50).is_err());
    for id in ["", "1x", "a b"] {
        assert_eq!(check_id(id).expect_err(id).to_string(), format!("Invalid job ID '{id}'"));
    }
    assert_eq!(no_job("x", true).kind().qmp_class(), "DeviceNotActive");
}
