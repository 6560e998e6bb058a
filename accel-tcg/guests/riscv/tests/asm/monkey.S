# The trap handler around random code: logs cause, pc and value, and goes on behind the instruction. mscratch points
# to the log. It ends when control leaves the 4-byte slots from `program` on.
#define EXIT 0x100000
        .text
        .globl _start
        .balign 4
_start: csrrw x31, mscratch, x31
        sd x30, 24(x31)
        sd x29, 32(x31)
        csrr x30, mcause
        sd x30, 0(x31)
        csrr x30, mtval
        sd x30, 16(x31)
        csrr x30, mepc
        sd x30, 8(x31)
        andi x30, x30, -4
        addi x30, x30, 4
        li x29, 0x80010000
        bltu x30, x29, 1f
        li x29, 0x80010100
        bgeu x30, x29, 1f
        csrw mepc, x30
        ld x30, 24(x31)
        ld x29, 32(x31)
        addi x31, x31, 40
        csrrw x31, mscratch, x31
        mret
1:      ld x30, 24(x31)
        ld x29, 32(x31)
        csrrw x31, mscratch, x31
        li x29, EXIT
        sw zero, 0(x29)
        j .
