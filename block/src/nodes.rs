//! Nodes by their names: the graph that monitors see and change.
//!
//! An [`Opener`] with a table puts each node that it opens into a [`NamedNode`], which says who uses it and lets
//! it be opened anew under its users. What monitors add lives until they delete it; other nodes live as long as their users.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use crate::graph::Opener;
use crate::node::{Extent, Plan, Preallocation, os_error};
use crate::options::{BlockdevOptions, NodeRef};
use crate::raw::RawImage;
use crate::{BlockError, BlockNode, Op};

/// Longest name of a node, in bytes.
const MAX_NAME: usize = 31;

/// Hears what nodes have to tell. Called by whoever does I/O: it must not block.
pub trait NodeEvents: Send + Sync + Debug {
    /// A write went `exceeded` bytes past `threshold`, which is off now.
    fn write_threshold(&self, node: &str, exceeded: u64, threshold: u64);
    /// The image is damaged, and not written any more.
    fn image_corrupted(&self, node: &str, message: &str);
}

/// What files and images tell of themselves, by the name of their node.
#[derive(Debug)]
pub struct NodeWatch {
    name: String,
    threshold: AtomicU64,
    /// The end of the write that came furthest.
    highest: AtomicU64,
    events: Option<Arc<dyn NodeEvents>>,
}

impl NodeWatch {
    /// A write ends at `end`.
    pub(crate) fn wrote(&self, end: u64) {
        // Mostly it is no new record, which costs no more than a look.
        if end > self.highest.load(Ordering::Relaxed) {
            self.highest.fetch_max(end, Ordering::Relaxed);
        }
        if end <= self.threshold.load(Ordering::Relaxed) {
            return;
        }
        let threshold = self.threshold.swap(u64::MAX, Ordering::Relaxed);
        if let (true, Some(events)) = (end > threshold, &self.events) {
            events.write_threshold(&self.name, end - threshold, threshold);
        }
    }

    pub(crate) fn corrupted(&self, message: &str) {
        if let Some(events) = &self.events {
            events.image_corrupted(&self.name, message);
        }
    }
}

/// How somebody uses a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Who, in words: `block device 'virtio0'`.
    pub who: String,
    /// As what: `root`, `file`, `backing`.
    pub role: &'static str,
    /// It is written.
    pub writes: bool,
    /// Others may write it.
    pub shares_write: bool,
}

/// A use of a node, which ends when this is dropped.
#[derive(Debug)]
pub struct Hold {
    node: Arc<NamedNode>,
    id: u64,
}

impl Hold {
    /// What is used.
    pub fn node(&self) -> &Arc<NamedNode> {
        &self.node
    }

    /// Who it is.
    pub fn user(&self) -> User {
        let gone = || User { who: String::new(), role: "root", writes: false, shares_write: true };
        self.node.users.lock().get(&self.id).cloned().unwrap_or_else(gone)
    }

    /// Goes on as another user, without a moment in which nobody uses the node.
    ///
    /// # Errors
    /// As [`NamedNode::hold`]; then it stays what it is.
    pub fn hand_over(&self, user: User) -> Result<(), BlockError> {
        let mut users = self.node.users.lock();
        let others = users.iter().filter(|(id, _)| **id != self.id).map(|(_, other)| other);
        self.node.check_users(others, &user)?;
        users.insert(self.id, user);
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.node.users.lock().remove(&self.id);
    }
}

/// A node with a name.
#[derive(Debug)]
pub struct NamedNode {
    watch: Arc<NodeWatch>,
    /// What it was opened with.
    options: Mutex<BlockdevOptions>,
    /// Empty while it is opened anew, when all its users stand.
    inner: RwLock<Option<Arc<dyn BlockNode>>>,
    /// Its uses of other nodes.
    holds: Mutex<Vec<Hold>>,
    users: Mutex<BTreeMap<u64, User>>,
    next_user: AtomicU64,
}

impl NamedNode {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.watch.name
    }

    /// What it was opened with.
    pub fn options(&self) -> BlockdevOptions {
        self.options.lock().clone()
    }

    /// The node itself.
    ///
    /// # Errors
    /// `EIO` while it is opened anew, or if that failed.
    pub fn inner(&self) -> io::Result<Arc<dyn BlockNode>> {
        self.inner.read().clone().ok_or_else(|| os_error(libc::EIO))
    }

    /// Who uses it.
    pub fn users(&self) -> Vec<User> {
        self.users.lock().values().cloned().collect()
    }

    /// Its uses of other nodes: in which role, and of what name.
    pub fn children(&self) -> Vec<(&'static str, String)> {
        let holds = self.holds.lock();
        let role = |h: &Hold| h.node.users.lock().get(&h.id).map(|u| u.role).unwrap_or("file");
        holds.iter().map(|h| (role(h), h.node.name().to_owned())).collect()
    }

    /// Starts a use of the node.
    ///
    /// # Errors
    /// [`BlockError::Option`] that names who stands against it.
    pub fn hold(self: &Arc<Self>, user: User) -> Result<Hold, BlockError> {
        let mut users = self.users.lock();
        self.check_users(users.values(), &user)?;
        let id = self.next_user.fetch_add(1, Ordering::Relaxed);
        users.insert(id, user);
        Ok(Hold { node: Arc::clone(self), id })
    }

    /// Whether `user` may be one beside `others`.
    fn check_users<'a>(
        &self,
        mut others: impl Iterator<Item = &'a User>,
        user: &User,
    ) -> Result<(), BlockError> {
        let against = |a: &User, b: &User| a.writes && !b.shares_write;
        let Some(other) = others.find(|u| against(user, u) || against(u, user)) else { return Ok(()) };
        let (writer, owner) = if against(user, other) { (user, other) } else { (other, user) };
        let name = self.name();
        Err(BlockError::Option(format!(
            "Permission conflict on node '{name}': permissions 'write' are both required by {} (uses node '{name}' as \
             '{}' child) and unshared by {} (uses node '{name}' as '{}' child).",
            writer.who, writer.role, owner.who, owner.role
        )))
    }

    /// Tells once when a write goes past `offset`; 0: not any more.
    pub fn set_write_threshold(&self, offset: u64) {
        self.watch.threshold.store(if offset == 0 { u64::MAX } else { offset }, Ordering::Relaxed);
    }

    /// What [`NamedNode::set_write_threshold`] has set and was not passed since, or 0.
    pub fn write_threshold(&self) -> u64 {
        match self.watch.threshold.load(Ordering::Relaxed) {
            u64::MAX => 0,
            offset => offset,
        }
    }

    /// The end of the write that came furthest since it was named.
    pub fn highest_write(&self) -> u64 {
        self.watch.highest.load(Ordering::Relaxed)
    }

    /// Takes it and the nodes below, if they are given up or were opened so.
    ///
    /// # Errors
    /// As [`BlockNode::activate`].
    pub fn take(&self) -> Result<(), BlockError> {
        let below: Vec<_> = self.holds.lock().iter().map(|h| Arc::clone(h.node())).collect();
        below.iter().try_for_each(|node| node.take())?;
        self.activate()
    }

    /// The node that it uses as `role`: `file`, `backing`, `data-file`.
    pub fn child(&self, role: &str) -> Option<Arc<Self>> {
        let holds = self.holds.lock();
        let is = |h: &&Hold| h.node.users.lock().get(&h.id).is_some_and(|u| u.role == role);
        holds.iter().find(is).map(|h| Arc::clone(&h.node))
    }

    /// True if `name` is this node or one below it.
    pub fn rests_on(&self, name: &str) -> bool {
        self.name() == name || self.holds.lock().iter().any(|h| h.node.rests_on(name))
    }

    /// How many nodes lie below it, one on the other.
    fn height(&self) -> usize {
        self.holds.lock().iter().map(|h| h.node.height() + 1).max().unwrap_or(0)
    }

    fn with<T>(&self, call: impl FnOnce(&Arc<dyn BlockNode>) -> io::Result<T>) -> io::Result<T> {
        match &*self.inner.read() {
            Some(node) => call(node),
            None => Err(os_error(libc::EIO)),
        }
    }

    fn ask<T>(&self, call: impl FnOnce(&Arc<dyn BlockNode>) -> T) -> Option<T> {
        self.inner.read().as_ref().map(call)
    }

    /// Files note their writes themselves, also those that come through their rings.
    fn note(&self, offset: u64, len: u64) {
        self.watch.wrote(offset.saturating_add(len));
    }
}

impl BlockNode for NamedNode {
    fn driver(&self) -> &'static str {
        self.ask(|n| n.driver()).unwrap_or("raw")
    }

    fn size(&self) -> u64 {
        self.ask(|n| n.size()).unwrap_or(0)
    }

    fn is_readonly(&self) -> bool {
        self.ask(|n| n.is_readonly()).unwrap_or(true)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with(|n| n.read_at(offset, buf))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.note(offset, buf.len() as u64);
        self.with(|n| n.write_at(offset, buf))
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|n| n.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(|n| n.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.note(offset, len);
        self.with(|n| n.write_zeroes(offset, len, unmap))
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.with(|n| n.status(offset, len))
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.with(|n| n.truncate(size, preallocation))
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        self.ask(|n| n.file()).flatten()
    }

    fn is_remote(&self) -> bool {
        self.ask(|n| n.is_remote()).unwrap_or(false)
    }

    fn backing(&self) -> Option<Arc<dyn BlockNode>> {
        self.ask(|n| n.backing()).flatten()
    }

    fn path(&self) -> Option<PathBuf> {
        self.ask(|n| n.path()).flatten()
    }

    fn grows_by_zeroes(&self) -> bool {
        self.ask(|n| n.grows_by_zeroes()).unwrap_or(true)
    }

    fn disk_usage(&self) -> u64 {
        self.ask(|n| n.disk_usage()).unwrap_or(0)
    }

    fn plan(&self, op: Op, offset: u64, len: u64) -> Option<Plan> {
        if op == Op::Write {
            self.note(offset, len);
        }
        self.ask(|n| n.plan(op, offset, len)).flatten()
    }

    fn data_file(&self) -> Option<Arc<RawImage>> {
        self.ask(|n| n.data_file()).flatten()
    }

    fn whole_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        self.inner().ok()?.whole_file()
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.with(|n| n.refresh_size())
    }

    fn inactivate(&self) -> io::Result<()> {
        self.ask(|n| n.inactivate()).unwrap_or(Ok(()))
    }

    fn can_inactivate(&self) -> io::Result<()> {
        self.ask(|n| n.can_inactivate()).unwrap_or(Ok(()))
    }

    fn activate(&self) -> Result<(), BlockError> {
        self.ask(|n| n.activate()).unwrap_or(Ok(()))
    }

    fn cancel_in_flight(&self) {
        self.ask(|n| n.cancel_in_flight());
    }

    fn as_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        self.inner().ok()?.as_file()
    }

    fn as_named(self: Arc<Self>) -> Option<Arc<NamedNode>> {
        Some(self)
    }
}

#[derive(Debug, Default)]
struct Table {
    /// Every node that is.
    all: BTreeMap<String, Weak<NamedNode>>,
    /// What monitors have added.
    kept: BTreeMap<String, Arc<NamedNode>>,
}

impl Table {
    fn find(&self, name: &str) -> Option<Arc<NamedNode>> {
        self.all.get(name).and_then(Weak::upgrade)
    }
}

/// The nodes of a program.
#[derive(Debug, Default)]
pub struct Nodes {
    table: Mutex<Table>,
    next: AtomicU64,
    events: Option<Arc<dyn NodeEvents>>,
    /// New nodes are opened without being taken.
    incoming: AtomicBool,
}

fn bad(text: String) -> BlockError {
    BlockError::Option(text)
}

impl Nodes {
    /// No nodes yet; what they have to tell goes to `events`.
    pub fn new(events: Arc<dyn NodeEvents>) -> Arc<Self> {
        Arc::new(Self { events: Some(events), ..Self::default() })
    }

    /// The node of that name.
    ///
    /// # Errors
    /// [`BlockError::Option`] if there is none.
    pub fn find(&self, name: &str) -> Result<Arc<NamedNode>, BlockError> {
        let found = self.table.lock().find(name);
        found.ok_or_else(|| bad(format!("Cannot find device='' nor node-name='{name}'")))
    }

    /// All nodes, by their names.
    pub fn list(&self) -> Vec<Arc<NamedNode>> {
        self.table.lock().all.values().filter_map(Weak::upgrade).collect()
    }

    /// Whether images that are opened from now on are another process's still, and ours only by [`Nodes::activate`].
    pub fn open_inactive(&self, yes: bool) {
        self.incoming.store(yes, Ordering::Release);
    }

    /// As [`Nodes::open_inactive`] has said.
    pub fn opens_inactive(&self) -> bool {
        self.incoming.load(Ordering::Acquire)
    }

    /// All nodes, each before those that it rests on.
    fn top_down(&self) -> Vec<Arc<NamedNode>> {
        let mut all: Vec<_> = self.list().into_iter().map(|n| (n.height(), n)).collect();
        all.sort_by_key(|(height, _)| std::cmp::Reverse(*height));
        all.into_iter().map(|(_, node)| node).collect()
    }

    /// Checks that all images can be given up for another process.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] naming the first node that cannot, and why.
    pub fn can_inactivate(&self) -> Result<(), BlockError> {
        self.top_down().iter().try_for_each(|node| {
            let text = |e: io::Error| BlockError::Unsupported(format!("node '{}': {e}", node.name()));
            node.can_inactivate().map_err(text)
        })
    }

    /// Gives all images up for another process; nobody has a request under way.
    ///
    /// # Errors
    /// [`BlockError::Host`]; then some are given up, which [`Nodes::activate`] undoes.
    pub fn inactivate(&self) -> Result<(), BlockError> {
        for node in self.top_down() {
            node.inactivate().map_err(|source| BlockError::Host {
                path: node.path().unwrap_or_else(|| node.name().into()),
                what: "cannot be given up",
                source,
            })?;
        }
        Ok(())
    }

    /// Takes all images that are given up or were opened so, and opens further ones as usual.
    ///
    /// # Errors
    /// [`BlockError`]; then all are given up.
    pub fn activate(&self) -> Result<(), BlockError> {
        let mut all = self.top_down();
        all.reverse();
        let take = |node: &Arc<NamedNode>| {
            node.activate()?;
            match node.refresh_size() {
                // A server that is gone keeps nobody from anything.
                Err(error) if node.users().is_empty() => {
                    tracing::warn!(node = node.name(), %error, "the size of an unused node is not known");
                    Ok(())
                }
                other => other.map_err(|source| BlockError::Host {
                    path: node.path().unwrap_or_else(|| node.name().into()),
                    what: "cannot get its size",
                    source,
                }),
            }
        };
        if let Err(error) = all.iter().try_for_each(take) {
            if let Err(second) = self.inactivate() {
                tracing::warn!(error = %second, "images stay taken");
            }
            return Err(error);
        }
        self.open_inactive(false);
        Ok(())
    }

    /// Opens a node by a monitor's options and keeps it until [`Nodes::remove`].
    ///
    /// # Errors
    /// [`BlockError`]; then there is no new node.
    pub fn add(self: &Arc<Self>, options: &BlockdevOptions, opener: &Opener) -> Result<(), BlockError> {
        if options.node_name.is_none() {
            return Err(bad("'node-name' must be specified for the root node".to_owned()));
        }
        if options.driver.is_none() {
            return Err(bad("Parameter 'driver' is missing".to_owned()));
        }
        opener.open_named(options).map(|_| ())
    }

    /// The options that would make a node as it is now, with the nodes below that are nobody else's.
    pub fn describe(&self, node: &Arc<NamedNode>) -> BlockdevOptions {
        with_children(node, |child| {
            if self.table.lock().kept.contains_key(child.name()) {
                return NodeRef::Name(child.name().to_owned());
            }
            let mut options = self.describe(child);
            // Names that begin so are given anew each time.
            options.node_name = Some(child.name().to_owned()).filter(|name| !name.starts_with('#'));
            NodeRef::Node(Box::new(options))
        })
    }

    /// Keeps a node that is there.
    pub fn keep(&self, node: Arc<NamedNode>) {
        self.table.lock().kept.insert(node.name().to_owned(), node);
    }

    /// Lets a node go that a monitor has added.
    ///
    /// # Errors
    /// [`BlockError::Option`] if it is not there, in use, or not a monitor's.
    pub fn remove(&self, name: &str) -> Result<(), BlockError> {
        let mut table = self.table.lock();
        let node =
            table.find(name).ok_or_else(|| bad(format!("Failed to find node with node-name='{name}'")))?;
        if !table.kept.contains_key(name) {
            return Err(bad(format!("Node {name} is not owned by the monitor")));
        }
        if !node.users().is_empty() {
            return Err(bad(format!("Node {name} is in use")));
        }
        let gone = table.kept.remove(name);
        // Closing it is work, and lets nodes below go.
        drop(table);
        drop(node);
        drop(gone);
        Ok(())
    }

    /// Gives a node that has just been opened its name. `named` is its own name, for those that were not given one.
    ///
    /// # Errors
    /// [`BlockError::Option`] if the name is taken or a child is used by others.
    pub(crate) fn name(
        &self,
        options: &BlockdevOptions,
        named: Option<&str>,
        inner: Arc<dyn BlockNode>,
    ) -> Result<Arc<NamedNode>, BlockError> {
        let name = match (&options.node_name, named) {
            (Some(name), _) => check_name(name)?.to_owned(),
            (None, Some(name)) => name.to_owned(),
            (None, None) => format!("#block{:03}", self.next.fetch_add(1, Ordering::Relaxed)),
        };
        let watch = Arc::new(NodeWatch {
            name: name.clone(),
            threshold: AtomicU64::new(u64::MAX),
            highest: AtomicU64::new(0),
            events: self.events.clone(),
        });
        let node = Arc::new(NamedNode {
            holds: Mutex::new(hold_children(&name, &inner)?),
            watch,
            options: Mutex::new(options.clone()),
            inner: RwLock::new(None),
            users: Mutex::default(),
            next_user: AtomicU64::new(0),
        });
        watch_inner(&node, &inner);
        *node.inner.write() = Some(inner);
        let mut table = self.table.lock();
        if table.find(&name).is_some() {
            return Err(bad(format!("Duplicate nodes with node-name='{name}'")));
        }
        table.all.retain(|_, node| node.strong_count() != 0);
        table.all.insert(name, Arc::downgrade(&node));
        Ok(node)
    }

    /// Opens a node anew by other options, under its users, who must all stand and have no request under way.
    ///
    /// # Errors
    /// [`BlockError`]; then it is as it was before, or, if that fails as well, every access to it does.
    pub fn reopen(&self, options: &BlockdevOptions, opener: &Opener) -> Result<(), BlockError> {
        let name = options.node_name.as_deref();
        let name = name.ok_or_else(|| bad("node-name not specified".to_owned()))?;
        let node =
            self.find(name).map_err(|_| bad(format!("Failed to find node with node-name='{name}'")))?;
        let old = with_children(&node, |child| NodeRef::Name(child.name().to_owned()));
        if options.driver.is_some() && options.driver != old.driver && old.driver.is_some() {
            return Err(bad("Cannot change the option 'driver'".to_owned()));
        }
        let wanted = merge(&old, options);
        if options.read_only == Some(true) && node.users().iter().any(|u| u.writes) {
            return Err(bad(format!("Cannot make block node read-only, there is a writer on it: '{name}'")));
        }
        // Its locks have to go before they can be taken again.
        let inner = node.inner.write().take();
        if let Some(inner) = &inner
            && let Err(error) = inner.flush()
        {
            tracing::warn!(name, %error, "the node cannot be flushed before it is opened anew");
        }
        let kept: Vec<Hold> = std::mem::take(&mut *node.holds.lock());
        let below: Vec<Arc<NamedNode>> = kept.iter().map(|h| Arc::clone(h.node())).collect();
        drop(inner);
        drop(kept);
        let result = put_in(&node, &wanted, opener);
        if result.is_err()
            && let Err(error) = put_in(&node, &old, opener)
        {
            tracing::error!(name, %error, "the node cannot be opened as it was before");
        }
        drop(below);
        result
    }
}

/// Opens what `node` is to be.
fn put_in(node: &Arc<NamedNode>, options: &BlockdevOptions, opener: &Opener) -> Result<(), BlockError> {
    let inner = opener.open_bare(options)?;
    let holds = hold_children(node.name(), &inner)?;
    watch_inner(node, &inner);
    *node.holds.lock() = holds;
    *node.inner.write() = Some(inner);
    *node.options.lock() = options.clone();
    Ok(())
}

/// A node's options with the nodes below as `refer` puts them.
fn with_children(node: &NamedNode, refer: impl Fn(&Arc<NamedNode>) -> NodeRef) -> BlockdevOptions {
    let mut options = node.options();
    let holds = node.holds.lock();
    for hold in holds.iter() {
        let role = hold.node.users.lock().get(&hold.id).map(|u| u.role);
        let place = match role {
            Some("file") => &mut options.file,
            Some("data-file") => &mut options.data_file,
            Some("backing") => &mut options.backing,
            _ => continue,
        };
        *place = Some(refer(&hold.node));
        if role == Some("file") {
            // It was short for the node below.
            options.filename = None;
        }
    }
    options
}

/// The options of a node that is opened anew: children that are not given stay, by their names.
fn merge(old: &BlockdevOptions, new: &BlockdevOptions) -> BlockdevOptions {
    let mut merged = BlockdevOptions { driver: new.driver.or(old.driver), ..new.clone() };
    let stays = |new: &mut Option<NodeRef>, old: &Option<NodeRef>| {
        if new.is_none() {
            new.clone_from(old);
        }
    };
    stays(&mut merged.file, &old.file);
    stays(&mut merged.backing, &old.backing);
    stays(&mut merged.data_file, &old.data_file);
    merged
}

/// Lets files and images tell of themselves.
fn watch_inner(node: &NamedNode, inner: &Arc<dyn BlockNode>) {
    if let Some(image) = inner.as_qcow2() {
        image.watch(Arc::clone(&node.watch));
    }
    // Such a file's queue is used past the node.
    if let Some(file) = Arc::clone(inner).whole_file() {
        file.watch(Arc::clone(&node.watch));
    }
}

/// Uses the nodes below `inner` in the name of the node `name`.
fn hold_children(name: &str, inner: &Arc<dyn BlockNode>) -> Result<Vec<Hold>, BlockError> {
    let data = inner.as_qcow2().and_then(|q| q.external_data());
    let children = [("file", inner.file()), ("data-file", data), ("backing", inner.backing())];
    let mut holds = Vec::new();
    for (role, child) in children {
        let Some(child) = child.and_then(|c| c.as_named()) else { continue };
        holds.push(child.hold(User {
            who: format!("node '{name}'"),
            role,
            writes: role != "backing" && !inner.is_readonly(),
            // Who reads an image bears no other that writes it.
            shares_write: false,
        })?);
    }
    Ok(holds)
}

fn check_name(name: &str) -> Result<&str, BlockError> {
    let well_formed = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if !well_formed {
        return Err(bad(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > MAX_NAME {
        return Err(bad("Node name too long".to_owned()));
    }
    Ok(name)
}

#[cfg(test)]
mod tests;
