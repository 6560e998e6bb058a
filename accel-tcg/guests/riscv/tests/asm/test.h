/* What the test programs share.
 *
 * A program runs from _start in M-mode. It ends by a store to EXIT, which is coded as QEMU's `virt` machine
 * has it, so that they can be tried there: 0x5555 if all is well, else 0x3333 with the number of the failed
 * test (in gp) in the upper half, and bit 31 set if it died of a trap.
 *
 * A trap to M-mode leaves mcause, mepc, mtval and mstatus in s2 to s5 and goes on, in M-mode, at the address in
 * s1, which is then 0; a trap to S-mode leaves scause, sepc, stval and sstatus in s6 to s9 and goes on, in S-mode,
 * at the address in s10. Either ends the program if its register is 0. t0 to t2 are scratch. */
#ifndef TEST_H
#define TEST_H

#define EXIT 0x100000
#define PIN(n) (0x200000 + 8 * (n))

#define MSTATUS_SIE 0x2
#define MSTATUS_MIE 0x8
#define MSTATUS_SPIE 0x20
#define MSTATUS_MPIE 0x80
#define MSTATUS_SPP 0x100
#define MSTATUS_MPP 0x1800
#define MSTATUS_FS 0x6000
#define MSTATUS_MPRV 0x20000
#define MSTATUS_SUM 0x40000
#define MSTATUS_MXR 0x80000
#define MSTATUS_TVM 0x100000
#define MSTATUS_TW 0x200000
#define MSTATUS_TSR 0x400000

#define U 0
#define S 1
#define M 3

/* Starts the program: handlers, floating point, everything open to all modes. */
#define START \
        .text; .globl _start; .balign 4; \
_start: la t0, m_trap; csrw mtvec, t0; la t0, s_trap; csrw stvec, t0; \
        li t0, -1; csrw pmpaddr0, t0; li t0, 0x1f; csrw pmpcfg0, t0; \
        li t0, MSTATUS_FS; csrs mstatus, t0; fscsr zero; \
        li s1, 0; li s10, 0; li gp, 0; j main; \
        .balign 4; \
m_trap: csrr s2, mcause; csrr s3, mepc; csrr s4, mtval; csrr s5, mstatus; \
        beqz s1, died; mv t0, s1; li s1, 0; jr t0; \
died:   li a0, 0x8000; or gp, gp, a0; j ufail; \
        .balign 4; \
s_trap: csrr s6, scause; csrr s7, sepc; csrr s8, stval; csrr s9, sstatus; \
        beqz s10, fail; mv t0, s10; li s10, 0; jr t0; \
fail:   \
ufail:  slli a0, gp, 16; li t0, 0x3333; or a0, a0, t0; li t0, EXIT; sw a0, 0(t0); j .; \
pass:   li a0, 0x5555; li t0, EXIT; sw a0, 0(t0); j .; \
main:

/* Starts test `n`. */
#define TEST(n) li gp, n

/* Fails unless `reg` is `value`. Usable in any mode. */
#define CHECK(reg, value) li t0, value; beq reg, t0, 77f; j ufail; 77:
#define CHECK_ADDR(reg, label) la t0, label; beq reg, t0, 77f; j ufail; 77:

/* Fails unless the bits of `mask` in `reg` are `value`. */
#define CHECK_BITS(reg, mask, value) li t0, mask; and t1, reg, t0; li t0, value; beq t1, t0, 77f; j ufail; 77:

/* From M-mode to `label` in `mode`. */
#define GO(mode, label) \
        li t0, MSTATUS_MPP; csrc mstatus, t0; li t0, (mode) << 11; csrs mstatus, t0; \
        la t0, label; csrw mepc, t0; mret

/* The next trap to M-mode goes on at `label`. */
#define M_TO(label) la s1, label
/* The next trap to S-mode goes on at `label`. */
#define S_TO(label) la s10, label

/* From any mode to `label` in M-mode, unless ecall is delegated. */
#define TO_M(label) la s1, label; ecall

/* rd = inst(a, b) */
#define RR(n, inst, want, a, b) \
        li gp, n; li a1, a; li a2, b; inst a4, a1, a2; li t2, want; beq a4, t2, 77f; j ufail; 77:
/* The same with rd = rs1, and with rd = rs2. */
#define RR_SAME(n, inst, want, a, b) \
        li gp, n; li a1, a; li a2, b; inst a1, a1, a2; li t2, want; beq a1, t2, 77f; j ufail; 77: \
        li a1, a; li a2, b; inst a2, a1, a2; beq a2, t2, 77f; j ufail; 77: \
        li a1, a; li a2, b; inst zero, a1, a2; beqz zero, 77f; j ufail; 77:
#define RI(n, inst, want, a, imm) \
        li gp, n; li a1, a; inst a4, a1, imm; li t2, want; beq a4, t2, 77f; j ufail; 77:
#define R1(n, inst, want, a) \
        li gp, n; li a1, a; inst a4, a1; li t2, want; beq a4, t2, 77f; j ufail; 77:

#endif
