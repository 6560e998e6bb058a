use std::ffi::OsString;

use holdfast_config::{AccelKind, CpuTopology};
use holdfast_vmm::control::ControlError;

use super::*;
use crate::process::describe;

fn args(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

fn run(line: &str) -> RunOptions {
    match parse(args(line)) {
        Ok(Invocation::Run(options)) => *options,
        Ok(other) => panic!("{other:?}"),
        Err(error) => panic!("{}", describe(&error)),
    }
}

fn refused(line: &str) -> String {
    match parse(args(line)) {
        Ok(other) => panic!("{other:?}"),
        Err(error) => describe(&error),
    }
}

#[test]
fn the_line_of_the_readme() {
    let options =
        run("holdfast run --arch riscv64 --machine virt --accel tcg --cpus boot=2 --memory size=512M \
                       --kernel K --initramfs I --cmdline console=ttyS0 --serial tty --console off");
    let config = options.config.unwrap();
    assert_eq!(config.guest_arch().name(), "riscv64");
    assert_eq!(config.machine_name(), "virt");
    assert_eq!(config.accel, holdfast_config::AccelChoice::Try(vec![AccelKind::Tcg]));
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus), (2, 2));
    assert_eq!(config.memory.size, 512 << 20);
    assert!(!config.has_console());
    assert_eq!(options.seccomp, SeccompMode::Kill);
}

#[test]
fn every_option() {
    let options = run(
        "holdfast run --firmware F --cmdline -x --name vm --machine q35,kernel_irqchip=off --arch x86_64 \
                       --accel kvm:tcg --perf-map --tcg-log file=/t,guest=on,filter=0x10+16 --cpus 4,max=8,topology=2:2:2:1,affinity=[0@[0-1]] \
                       --memory size=1G,shared=on,hugepages=on,hugepage_size=2M,prefault=on,thp=off \
                       --platform uuid=6ba7b810-9dad-11d1-80b4-00c04fd430c8 \
                       --disk path=/a,readonly=on,serial=s1 path=/b,direct=on,image_type=raw --disk path=/c \
                       --net tap=tap0,mac=02:00:00:00:00:01,ip=10.0.0.1,mask=255.255.255.0,mtu=1500,id=n \
                       --net fd=[3,4],num_queues=4 --net tap=t,vhost=on,vhostfd=7 --vsock cid=3,vhost=on,vhostfd=8 --rng src=/dev/random --balloon size=1M,deflate_on_oom=on \
                       --serial file=/s --console pty --debug-console file=/d,iobase=0x402 \
                       --api-socket path=/api --event-monitor fd=9 --qmp unix:/q --gdb tcp:[::1]:1234 --gdb-wait --log-file /l -vv \
                       --seccomp log --landlock --landlock-rules path=/x,access=rw --no-shutdown",
    );
    let config = options.config.unwrap();
    assert!(config.perf_map);
    let log = config.tcg_log.as_ref().unwrap();
    assert!(log.guest && !log.host && log.range() == Ok(Some((16, 31))));
    assert_eq!((options.gdb, options.gdb_wait), (Some(QmpAddress::Tcp("::1".into(), 1234)), true));
    let topology = CpuTopology { threads_per_core: 2, cores_per_die: 2, dies_per_package: 2, packages: 1 };
    assert_eq!(config.cpus.topology, Some(topology));
    assert_eq!(config.cpus.affinity.as_ref().unwrap()[0].host_cpus, [0, 1]);
    assert_eq!(config.disks().len(), 3);
    assert!(config.disks()[0].readonly && config.disks()[1].direct);
    assert_eq!(config.net()[1].fds, Some(vec![3, 4]));
    assert_eq!((config.net()[2].vhost, &config.net()[2].vhostfds), (true, &Some(vec![7])));
    assert_eq!(config.vsock.as_ref().map(|vsock| (vsock.vhost, vsock.vhostfd)), Some((true, Some(8))));
    assert_eq!(config.serial.file, Some("/s".into()));
    assert_eq!(config.debug_console.iobase, Some(0x402));
    assert!(config.landlock_enable && options.no_shutdown);
    assert_eq!(options.api_socket, Some(Endpoint::Path("/api".into())));
    assert_eq!(options.event_monitor, Some(Endpoint::Fd(9)));
    assert_eq!(options.qmp, Some(QmpAddress::Unix("/q".into())));
    assert_eq!((options.verbosity, options.seccomp), (2, SeccompMode::Log));
}

#[test]
fn an_error_names_option_value_and_remedy() {
    let says = |options: &str| refused(&format!("holdfast run --kernel K --console off {options}"));
    assert_eq!(
        says("--disk path=/x,readonly=maybe"),
        "--disk: key `readonly`, value `maybe`: must be `on` or `off`"
    );
    assert_eq!(
        says("--accel xen"),
        "--accel `xen`: `xen` is no accelerator; kvm, tcg, auto and lists like kvm:tcg are"
    );
    assert!(says("--arch vax").starts_with("--arch `vax`: `vax` is no guest architecture"));
    assert!(says("--net colour=red").starts_with("--net: key `colour` (value `red`) is unknown; tap, ip,"));
    assert_eq!(says("--seccomp maybe"), "--seccomp `maybe`: must be true, false, log or errno");
    assert_eq!(says("--qmp udp:x"), "--qmp `udp:x`: must be unix:PATH or tcp:HOST:PORT");
    assert_eq!(says("--gdb 1234"), "--gdb `1234`: must be unix:PATH or tcp:HOST:PORT");
    assert_eq!(says("--gdb-wait"), "--gdb-wait waits for a debugger; say with --gdb where it connects");
    assert!(says("--tcg-log file=/x").contains("`tcg_log`: logs nothing"));
    assert_eq!(says("--event-monitor x"), "--event-monitor `x`: must be path=PATH or fd=N");
    assert!(says("--memory size=1000 --cpus boot=0").contains("`cpus.boot_vcpus`: is 0"));
    assert!(says("--memory size=1000 --cpus boot=0").contains("`memory.size`: is 1000"));
    assert!(says("--serial teletype").contains("off, pty, tty, file, socket, null"));
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let says = |options: &str| refused(&format!("holdfast run --kernel K --console off {options}"));
    for option in ["pmem file=x", "watchdog", "tpm socket=/x", "memory-zone", "user-device socket=/x"] {
        let name = option.split(' ').next().unwrap();
        assert!(says(&format!("--{option}")).starts_with(&format!("--{name} is a Cloud Hypervisor option")));
    }
    assert!(says("--cpus boot=1,nested=off").contains("key `nested` is a Cloud Hypervisor key"));
    assert!(says("--disk path=/x,bw_size=1").contains("key `bw_size` is a Cloud Hypervisor key"));
    assert!(says("--disk path=/x,vhost_user=on").contains("`disks[0].vhost_socket`"));
    assert_eq!(
        says("--device path=/x"),
        "--device: key `path` is a Cloud Hypervisor key that is not supported by this version of Holdfast"
    );
    assert!(says("--vdpa path=/dev/vhost-vdpa-0").starts_with("--vdpa is a Cloud Hypervisor option"));
    assert!(says("--device vhost-scsi-pci,wwpn=x").contains("no device `vhost-scsi-pci`"));
    let unknown = says("--device rtl8139,mac=x");
    assert!(unknown.contains("no device `rtl8139`") && unknown.contains("pci-testdev"), "{unknown}");
    assert!(says("--device pc-testdev,iobase=1").contains("`iobase`"));
    assert!(says("--device isa-debug-exit,iosize=9").contains("`board_devices[0].iosize`: is 9"));
    assert!(says("--device pc-testdev --device pc-testdev").contains("have two `pc-testdev`"));
    let ctl = refused("holdfast ctl --api-socket /s add-pmem file=x");
    assert_eq!(ctl, "ctl add-pmem is not supported by this version of Holdfast");
}

#[test]
fn options_must_fit_together() {
    assert!(refused("holdfast run").contains("nothing to do"));
    assert!(
        refused("holdfast run --api-socket /s --disk path=/x")
            .contains("--disk describes a VM, but nothing boots")
    );
    assert!(refused("holdfast run --restore file:///x --kernel K").contains("leave --kernel"));
    assert!(refused("holdfast run --kernel K --serial tty").contains("`console.mode`"));
    let waits = run("holdfast run --api-socket fd=3");
    assert_eq!((waits.config, waits.api_socket), (None, Some(Endpoint::Fd(3))));
    let restore =
        run("holdfast run --restore file:///x,memory_restore_mode=ondemand,resume=on").restore.unwrap();
    assert!(restore.resume);
    assert_eq!(restore.directory(), Some("/x".into()));
}

#[test]
fn it_answers_to_cloud_hypervisors_name() {
    let Err(CliError::Usage(version)) = parse(args("/usr/bin/cloud-hypervisor --version")) else {
        panic!("no version")
    };
    assert_eq!(version.to_string().lines().next(), Some("cloud-hypervisor v54.0.0"));
    let Ok(Invocation::Run(options)) = parse(args("cloud-hypervisor --api-socket fd=3 -v --seccomp false"))
    else {
        panic!("no run")
    };
    assert_eq!((options.verbosity, options.seccomp), (1, SeccompMode::Off));
}

#[test]
fn help_names_every_key() {
    let Err(CliError::Usage(help)) = parse(args("holdfast run --help")) else { panic!("no help") };
    let help = help.to_string();
    for words in [
        "boot=N",
        "readonly=on|off",
        "mode=off|pty|tty|file|socket|null",
        "hugepage_size=SIZE",
        "[default: 512M]",
    ] {
        assert!(help.contains(words), "{words} is not in\n{help}");
    }
    assert!(!help.contains("--pmem"), "refused options are not offered");
    command(true).debug_assert();
}

#[test]
fn verbs_become_requests() {
    let ctl = |line: &str| match parse(args(&format!("holdfast ctl --api-socket /s {line}"))) {
        Ok(Invocation::Ctl(ctl)) => ctl,
        Ok(other) => panic!("{other:?}"),
        Err(error) => panic!("{}", describe(&error)),
    };
    let ping = ctl("ping");
    assert_eq!((ping.endpoint, ping.get, ping.body), ("vmm.ping", true, None));
    assert_eq!(ctl("shutdown-vmm").endpoint, "vmm.shutdown");
    let net = ctl("add-net fd=[5,6],num_queues=4");
    assert_eq!((net.endpoint, net.fds), ("vm.add-net", vec![5, 6]));
    assert!(!net.body.unwrap().contains("fds"));
    assert_eq!(ctl("resize --balloon 1M").body.unwrap(), r#"{"desired_balloon":1048576}"#);
    let restore = ctl("restore source_url=file:///x,net_fds=[n@[7,8]]");
    assert_eq!(restore.fds, [7, 8]);
    assert!(restore.body.unwrap().contains(r#""net_fds":[{"id":"n","num_fds":2}]"#));
    assert_eq!(ControlError::not_created().kind().http_status(), 404);
}
