//! Hosts as network namespaces: `a` and `b`, between which a VM moves over a link of their own, and `c`, a peer that is on one
//! switched network with the VM wherever that is. Needs root.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::devices::run;
use crate::relay::{self, Relay};

/// The guest's address on the switched network, at which its test `lab` connects to 10.77.0.1.
pub const GUEST: [u8; 4] = [10, 77, 0, 2];
/// The guest's MAC address.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 2];
/// Ethertypes of ARP and reverse ARP.
pub const ARP: u16 = 0x0806;
/// See [`ARP`].
pub const RARP: u16 = 0x8035;

/// The namespaces; they go when this is dropped.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    relay: Option<Relay>,
}

fn ip(args: &str) {
    run(Command::new("ip").args(args.split(' ')));
}

impl Lab {
    /// Makes the namespaces and what is between them. The link between the hosts carries `rate` (tc's words), delays by 2 ms and
    /// loses one packet of a thousand: by netem, or, where the kernel has none, by a [`Relay`].
    ///
    /// # Panics
    /// If the host refuses.
    pub fn new(rate: &str) -> Self {
        let prefix = format!("hf{}", std::process::id());
        let mut lab = Self { prefix, relay: None };
        let switch = lab.name('s');
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add br0 type bridge"));
        ip(&format!("-n {switch} link set br0 up"));
        for host in ['a', 'b', 'c'] {
            let ns = lab.name(host);
            ip(&format!("netns add {ns}"));
            ip(&format!("-n {ns} link set lo up"));
            ip(&format!("link add port{host} netns {switch} type veth peer name eth0 netns {ns}"));
            ip(&format!("-n {switch} link set port{host} master br0 up"));
            ip(&format!("-n {ns} link set eth0 up"));
        }
        for host in ['a', 'b'] {
            let ns = lab.name(host);
            ip(&format!("-n {ns} link add br0 type bridge"));
            ip(&format!("-n {ns} link set br0 up"));
            ip(&format!("-n {ns} link set eth0 master br0"));
            ip(&format!("-n {ns} tuntap add tap0 mode tap"));
            ip(&format!("-n {ns} link set tap0 master br0 up"));
        }
        ip(&format!("-n {} addr add 10.77.0.1/24 dev eth0", lab.name('c')));
        let [a, b] = ['a', 'b'].map(|host| lab.name(host));
        ip(&format!("link add mig0 netns {a} type veth peer name mig0 netns {b}"));
        let netem = |ns| format!("-n {ns} qdisc add dev mig0 root netem delay 2ms loss 0.1% rate {rate}");
        let done = [&a, &b].map(|ns| Command::new("tc").args(netem(ns).split(' ')).output().expect("tc"));
        if done.iter().any(|done| !done.status.success()) {
            ip(&format!("-n {a} link del mig0"));
            let ends = ['a', 'b'].map(|host| lab.on(host, || relay::tap("mig0")));
            lab.relay = Some(Relay::start(ends, Duration::from_millis(2), 1000));
            for ns in [&a, &b] {
                // Long frames, for the thread has to move each.
                ip(&format!("-n {ns} link set mig0 mtu 9000"));
                let tbf = format!("-n {ns} qdisc add dev mig0 root tbf rate {rate} burst 256kb latency 50ms");
                run(Command::new("tc").args(tbf.split(' ')));
            }
        }
        for (ns, address) in [(&a, "10.78.0.1/24"), (&b, "10.78.0.2/24")] {
            ip(&format!("-n {ns} addr add {address} dev mig0"));
            ip(&format!("-n {ns} link set mig0 up"));
        }
        lab
    }

    /// The namespace of a host.
    pub fn name(&self, host: char) -> String {
        format!("{}{host}", self.prefix)
    }

    /// `program` as it is run on a host.
    pub fn command(&self, host: char, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(host)]).arg(program);
        command
    }

    /// Does something on a host: sockets that it makes stay there.
    ///
    /// # Panics
    /// If the host is gone, or `what` panics.
    pub fn on<T: Send>(&self, host: char, what: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/var/run/netns/{}", self.name(host))).expect("the namespace");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // SAFETY: it changes the namespace of this thread alone.
                let rc = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
                what()
            });
            thread.join().expect("the thread")
        })
    }

    /// How many packets the link between the hosts has lost, where that is known.
    pub fn lost(&self) -> Option<u64> {
        self.relay.as_ref().map(Relay::lost)
    }

    /// Cuts the link between the hosts, or mends it.
    ///
    /// # Panics
    /// If the host refuses.
    pub fn set_link(&self, up: bool) {
        ip(&format!("-n {} link set mig0 {}", self.name('a'), if up { "up" } else { "down" }));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in ['a', 'b', 'c', 's'] {
            // What is left goes with the machine.
            let _ = Command::new("ip").args(["netns", "del", &self.name(host)]).status();
        }
    }
}

/// What the guest's test `lab` connects to: it counts in lines, on one connection.
#[derive(Debug)]
pub struct Peer {
    count: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
}

impl Peer {
    /// Listens on host `c`.
    ///
    /// # Panics
    /// If it cannot.
    pub fn listen(lab: &Lab) -> Self {
        let listener = lab.on('c', || TcpListener::bind("10.77.0.1:7000").expect("the address"));
        let (count, broken) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, ended) = (Arc::clone(&count), Arc::clone(&broken));
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("the guest connects");
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { break };
                let next = counted.load(Ordering::Acquire) + 1;
                if line != format!("STREAM {next}") {
                    break;
                }
                counted.store(next, Ordering::Release);
            }
            ended.store(true, Ordering::Release);
        });
        Self { count, broken }
    }

    /// Waits for `more` lines.
    ///
    /// # Panics
    /// If the connection is over, a line is wrong, or they do not come.
    pub fn goes_on(&self, more: u64) {
        let want = self.count.load(Ordering::Acquire) + more;
        let deadline = Instant::now() + crate::migration::LIMIT;
        while self.count.load(Ordering::Acquire) < want {
            assert!(!self.broken.load(Ordering::Acquire), "the guest's connection broke");
            assert!(Instant::now() < deadline, "the guest's connection stands still");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Hears all frames of one ethertype on host `c`.
#[derive(Debug)]
pub struct Ear(OwnedFd);

impl Ear {
    /// Begins to listen.
    ///
    /// # Panics
    /// If the host refuses.
    pub fn open(lab: &Lab, ethertype: u16) -> Self {
        let fd = lab.on('c', || {
            let protocol = i32::from(ethertype.to_be());
            // SAFETY: plain numbers.
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) }
        });
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: it was just made and is nobody else's.
        Self(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Forgets what was heard so far.
    pub fn forget(&self) {
        let mut frame = [0_u8; 2048];
        // SAFETY: the buffer is of the length given.
        while unsafe {
            libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), libc::MSG_DONTWAIT)
        } > 0
        {}
    }

    /// Waits for a frame that `is` the one.
    ///
    /// # Panics
    /// If none comes.
    pub fn hears(&self, what: &str, is: impl Fn(&[u8]) -> bool) {
        let deadline = Instant::now() + crate::migration::LIMIT;
        let mut frame = [0_u8; 2048];
        while Instant::now() < deadline {
            let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            if unsafe { libc::poll(&mut poll, 1, 100) } <= 0 {
                continue;
            }
            // SAFETY: the buffer is of the length given.
            let n = unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
            if n > 0 && is(&frame[..n as usize]) {
                return;
            }
        }
        panic!("no {what}");
    }
}
