//! Runs a q35 on KVM without the rest of the VMM, for work on the machine itself. Serial output goes to the
//! terminal; with `--debug` the debug console (port 0x402) goes to standard error.

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use holdfast_accel::IrqChip;
use holdfast_devices::chardev::{CharBackend, CharReceiver};
use rig::{Options, Rig};

#[derive(Debug)]
struct Print(bool);

impl CharBackend for Print {
    fn send(&self, data: &[u8]) {
        let done = if self.0 {
            std::io::stderr().write_all(data)
        } else {
            let mut out = std::io::stdout();
            out.write_all(data).and_then(|()| out.flush())
        };
        if let Err(error) = done {
            eprintln!("output is lost: {error}");
        }
    }
    fn connect(&self, _receiver: Arc<dyn CharReceiver>) {}
    fn receiver_ready(&self) {}
    fn label(&self) -> String {
        "print".into()
    }
}

fn main() {
    let mut o = Options { serial: Some(Arc::new(Print(false))), ..Options::default() };
    let mut seconds = 60;
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let mut value = || args.next().unwrap_or_default();
        match name.as_str() {
            "--kernel" => o.payload.kernel = Some(value().into()),
            "--initramfs" => o.payload.initramfs = Some(value().into()),
            "--firmware" => o.payload.firmware = Some(value().into()),
            "--cmdline" => o.payload.cmdline = value(),
            "--cpus" => o.cpus = value().parse().expect("a number"),
            "--memory" => o.memory = value().parse().expect("MiB"),
            "--disk" => o.disk = Some(value()),
            "--seconds" => seconds = value().parse().expect("a number"),
            "--on" => o.irqchip = IrqChip::On,
            "--debug" => o.debug_console = Some(Arc::new(Print(true))),
            other => panic!("unknown option {other}"),
        }
    }
    let end = Rig::new(&o).run(Duration::from_secs(seconds));
    println!("\n[{end:?}]");
}
