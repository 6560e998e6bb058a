//! Names, users, and nodes that are opened anew.

use holdfast_threads::PlainSpawner;

use super::*;

#[derive(Debug, Default)]
struct Heard(Mutex<Vec<(String, u64, u64)>>);

impl NodeEvents for Heard {
    fn write_threshold(&self, node: &str, exceeded: u64, threshold: u64) {
        self.0.lock().push((node.to_owned(), exceeded, threshold));
    }
    fn image_corrupted(&self, node: &str, message: &str) {
        self.0.lock().push((format!("{node}: {message}"), 0, 0));
    }
}

struct Rig {
    nodes: Arc<Nodes>,
    heard: Arc<Heard>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let heard = Arc::new(Heard::default());
        let dir = tempfile::tempdir().expect("directory");
        std::fs::write(dir.path().join("a"), vec![7; 1 << 20]).expect("file");
        Self { nodes: Nodes::new(Arc::clone(&heard) as Arc<dyn NodeEvents>), heard, dir }
    }

    fn options(&self, text: &str) -> (BlockdevOptions, Opener) {
        let text = text.replace("DIR", &self.dir.path().display().to_string());
        let options = BlockdevOptions::from_pairs(&text).expect("options");
        let opener = Opener {
            writable: options.read_only != Some(true),
            nodes: Some(Arc::clone(&self.nodes)),
            name: "test".to_owned(),
            ..Opener::reading(PlainSpawner::shared())
        };
        (options, opener)
    }

    fn add(&self, text: &str) -> Result<(), String> {
        let (options, opener) = self.options(text);
        self.nodes.add(&options, &opener).map_err(|e| e.to_string())
    }
}

const RAW: &str = "driver=raw,node-name=fmt,file.driver=file,file.node-name=f0,file.filename=DIR/a";

#[test]
fn names_are_given_once_and_nodes_go_when_nobody_uses_them() {
    let rig = Rig::new();
    rig.add(RAW).expect("added");
    let names: Vec<_> = rig.nodes.list().iter().map(|n| n.name().to_owned()).collect();
    assert_eq!(names, ["f0", "fmt"]);
    let fmt = rig.nodes.find("fmt").expect("there");
    assert_eq!(fmt.children(), [("file", "f0".to_owned())]);
    assert!(
        rig.add("driver=file,node-name=fmt,filename=DIR/a,read-only=on,locking=off")
            .is_err_and(|e| e == "Duplicate nodes with node-name='fmt'")
    );
    let error = rig.add("driver=raw,node-name=other,file=f0").expect_err("in use");
    assert!(error.starts_with("Permission conflict on node 'f0': permissions 'write'"), "{error}");
    assert!(rig.add("driver=raw,node-name=other,file=nope").expect_err("none").contains("nope"));
    assert!(rig.add("driver=raw,file=f0").expect_err("no name").contains("'node-name'"));
    for name in ["1a", "a b", "", "a234567890123456789012345678901234567890"] {
        assert!(rig.add(&format!("driver=file,filename=DIR/a,node-name={name}")).is_err(), "{name}");
    }
    let user = User { who: "you".to_owned(), role: "root", writes: true, shares_write: false };
    let hold = fmt.hold(user.clone()).expect("free");
    assert!(fmt.hold(user.clone()).is_err());
    let reader = User { writes: false, shares_write: true, ..user.clone() };
    assert!(fmt.hold(reader).is_ok(), "who only reads and bears others");
    assert_eq!(rig.nodes.remove("fmt").expect_err("used").to_string(), "Node fmt is in use");
    assert_eq!(
        rig.nodes.remove("f0").expect_err("a child").to_string(),
        "Node f0 is not owned by the monitor"
    );
    hold.hand_over(User { who: "me".to_owned(), ..user.clone() }).expect("nobody else writes");
    assert_eq!(fmt.users()[0].who, "me");
    let other = fmt.hold(User { writes: false, shares_write: true, ..user.clone() }).expect("reads");
    assert!(other.hand_over(user).is_err());
    drop((other, hold, fmt));
    rig.nodes.remove("fmt").expect("gone");
    assert!(rig.nodes.find("f0").is_err(), "it had no other user");
    rig.add(RAW).expect("its locks are gone");
}

#[test]
fn a_node_is_opened_anew_under_its_user() {
    let rig = Rig::new();
    rig.add(RAW).expect("added");
    let fmt = rig.nodes.find("fmt").expect("there");
    assert_eq!(fmt.size(), 1 << 20);
    let (options, opener) = rig.options("driver=raw,node-name=fmt,offset=4096,file=f0");
    rig.nodes.reopen(&options, &opener).expect("reopened");
    assert_eq!(fmt.size(), (1 << 20) - 4096);
    fmt.write_at(0, &[9; 512]).expect("written");
    assert_eq!(std::fs::read(rig.dir.path().join("a")).expect("file")[4096..4608], [9; 512]);
    // What cannot be leaves it as it was.
    let (options, opener) = rig.options("driver=raw,node-name=fmt,offset=2097152,file=f0");
    assert!(rig.nodes.reopen(&options, &opener).is_err());
    assert_eq!(fmt.size(), (1 << 20) - 4096);
    let (options, opener) = rig.options("driver=qcow2,node-name=fmt,file=f0");
    assert_eq!(
        rig.nodes.reopen(&options, &opener).expect_err("no").to_string(),
        "Cannot change the option 'driver'"
    );
}

#[test]
fn a_write_past_the_threshold_is_told_once() {
    let rig = Rig::new();
    rig.add(RAW).expect("added");
    let fmt = rig.nodes.find("fmt").expect("there");
    fmt.set_write_threshold(8192);
    fmt.write_at(4096, &[1; 4096]).expect("written");
    assert!(rig.heard.0.lock().is_empty());
    fmt.write_at(8192, &[1; 512]).expect("written");
    fmt.write_at(8192, &[1; 512]).expect("written");
    assert_eq!(*rig.heard.0.lock(), [("fmt".to_owned(), 512, 8192)]);
    assert_eq!(fmt.write_threshold(), 0);
}
