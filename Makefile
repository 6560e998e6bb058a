# The two commands of the README are `make demo` and `make test`.
SHELL := /bin/bash
.PHONY: demo test build setup-demo setup-test lint fmt fuzz bench clean-guests

DEMO_CPUS ?= 2
DEMO_MEMORY ?= 512M

# What a bare Debian machine lacks. Rust itself: see README.
DEMO_PACKAGES := gcc libc6-dev cpio kmod xz-utils zstd ca-certificates debian-archive-keyring opensbi
TEST_PACKAGES := $(DEMO_PACKAGES) qemu-user qemu-utils cryptsetup-bin nbdkit libnbd-bin python3-libnbd gnutls-bin binutils openssl qemu-system-misc gcc-riscv64-linux-gnu \
	libc6-dev-riscv64-cross device-tree-compiler acpica-tools seabios grub-pc-bin grub-common mtools \
	stress-ng gdb-multiarch busybox-static dosfstools e2fsprogs fdisk dnsmasq-base mmdebstrap iproute2 \
	iputils-ping socat tmux lz4 python3 python3-venv curl dbus-daemon python3-dbus python3-gi

BENCH_PACKAGES := $(TEST_PACKAGES) qemu-system-x86

build:
	cargo build --release --locked --bin holdfast

setup-demo:
	tests/setup $(DEMO_PACKAGES)

setup-test:
	tests/setup $(TEST_PACKAGES)

# Builds, fetches Debian's riscv64 kernel and busybox, and boots them to a shell on this terminal.
demo: setup-demo build
	@guest=$$(tests/guests/fetch-riscv64) && exec "$${CARGO_TARGET_DIR:-target}/release/holdfast" run --arch riscv64 --machine virt \
		--accel tcg --cpus boot=$(DEMO_CPUS) --memory size=$(DEMO_MEMORY) --kernel $$guest/Image \
		--initramfs $$guest/initramfs.cpio --cmdline "console=ttyS0 quiet" --serial tty --console off

# Every test there is, as CI runs it.
test: setup-test
	tests/run-all

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

fmt:
	cargo fmt --all

bench: setup-test build
	tests/setup $(BENCH_PACKAGES)
	tests/bench/run
