//! The targets, one in each module.

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        $(pub mod $name;)*

        /// All targets by name.
        pub const TARGETS: &[(&str, fn(&[u8]))] = &[$((stringify!($name), $name::run)),*];
    };
}

targets![
    acpi_tables,
    dbus_bus,
    device_state,
    disk_image,
    fdt_tree,
    flash_commands,
    fw_cfg,
    kernel_load,
    migration_stream,
    mmio_registers,
    multiboot,
    nbd_client,
    nbd_server,
    options,
    pci_config,
    pci_config_virt,
    pio_registers,
    qmp_lines,
    rest_body,
    riscv_decode,
    snapshot_files,
    virtio_console,
    virtio_net,
    virtio_pci,
    virtqueue,
];
