# Supervisor level: delegation, sret, paging, SUM and MXR, sfence.vma, supervisor interrupts, Sstc.
#include "test.h"

#define stimecmp 0x14d
#define menvcfg 0x30a

#define V 1
#define R 2
#define W 4
#define X 8
#define PU 16
#define A 64
#define D 128

/* The entry of `table` for `index` becomes the page of `label` with `bits`. */
#define MAP(table, index, label, bits) \
        la t1, label; srli t1, t1, 12; slli t1, t1, 10; li t2, bits; or t1, t1, t2; \
        la t2, table + 8 * (index); sd t1, 0(t2)

        START
        li a0, 0xb1ff # all but ecall from S-mode
        csrw medeleg, a0
        TEST(1) # delegated, from U-mode
        S_TO(2f)
        GO(U, 1f)
1:      .word 0xffffffff
        j ufail
2:      CHECK(s6, 2)
        CHECK_ADDR(s7, 1b)
        CHECK(s8, 0xffffffff)
        CHECK_BITS(s9, MSTATUS_SPP, 0)
        TEST(2) # from S-mode, with interrupts on
        S_TO(2f)
        csrsi sstatus, MSTATUS_SIE
1:      ebreak
        j ufail
2:      CHECK(s6, 3)
        CHECK_BITS(s9, MSTATUS_SPP | MSTATUS_SPIE | MSTATUS_SIE, MSTATUS_SPP | MSTATUS_SPIE)
        csrci sstatus, MSTATUS_SIE
        TEST(3) # sret to U-mode and back by ecall
        li a0, MSTATUS_SPP
        csrc sstatus, a0
        li a0, MSTATUS_SPIE
        csrs sstatus, a0
        la a0, 1f
        csrw sepc, a0
        S_TO(2f)
        sret
1:      ecall
        j ufail
2:      CHECK(s6, 8)
        CHECK_ADDR(s7, 1b)
        CHECK_BITS(s9, MSTATUS_SPP | MSTATUS_SPIE | MSTATUS_SIE, MSTATUS_SPIE)
        csrci sstatus, MSTATUS_SIE
        TEST(4) # an exception in M-mode stays there
        TO_M(1f)
1:      M_TO(2f)
0:      ebreak
2:      CHECK(s2, 3)
        CHECK_ADDR(s3, 0b)
        TEST(5) # sscratch and friends
        li a0, 0x123456789abcdef0
        csrw sscratch, a0
        csrrw a1, sscratch, zero
        CHECK(a1, 0x123456789abcdef0)

        # Paging: RAM's gigabyte maps itself for S-mode; 4 KiB pages at virtual 0 to 2 MiB.
        TEST(10)
        MAP(root, 2, ram, V | R | W | X | A | D)
        MAP(root, 0, mid, V)
        MAP(mid, 0, leaf, V)
        MAP(leaf, 256, exit, V | R | W | A | D)
        MAP(leaf, 1, page_a, V | R | W | A | D)
        MAP(leaf, 2, page_b, V | R | A)
        MAP(leaf, 3, page_a, V | R | W | X | PU)
        MAP(leaf, 4, page_b, V | X | A)
        MAP(leaf, 5, page_a, V | R | W)
        MAP(leaf, 6, page_b, V | W | A | D)
        MAP(mid, 2, ram, V | R | W | X | A | D)
        MAP(mid, 3, page_b, V | R | W | X | A | D)
        la a0, root
        srli a0, a0, 12
        li a1, 8
        slli a1, a1, 60
        or a0, a0, a1
        csrw satp, a0
        sfence.vma
        la a2, page_a
        la a3, page_b
        li a0, 0x1111
        sd a0, 0(a2)
        li a0, 0x2222
        sd a0, 0(a3)
        GO(S, super)
super:  li a4, 0x1000
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        li a0, 0x3333
        sd a0, 8(a4)
        ld a0, 8(a2)
        CHECK(a0, 0x3333)
        TEST(11) # an access across two pages that are mapped apart
        li a4, 0x1ffc
        lwu a0, 0(a4)
        ld a0, 0(a4)
        srli a0, a0, 32
        CHECK(a0, 0x2222)
        TEST(12) # read-only: a store faults and changes nothing
        li a4, 0x2000
        ld a0, 0(a4)
        CHECK(a0, 0x2222)
        S_TO(2f)
1:      sd zero, 0(a4)
        j ufail
2:      CHECK(s6, 15)
        CHECK_ADDR(s7, 1b)
        CHECK(s8, 0x2000)
        ld a0, 0(a3)
        CHECK(a0, 0x2222)
        TEST(13) # a store across into the read-only page: the address of the part that faults
        li a4, 0x1ffc
        S_TO(2f)
        sd zero, 0(a4)
        j ufail
2:      CHECK(s6, 15)
        CHECK(s8, 0x2000)
        TEST(14) # not mapped; not executable; not canonical
        li a4, 0x7000
        S_TO(2f)
        ld a0, 16(a4)
        j ufail
2:      CHECK(s6, 13)
        CHECK(s8, 0x7010)
        li a4, 0x1000
        S_TO(2f)
        jr a4
2:      CHECK(s6, 12)
        CHECK(s7, 0x1000)
        CHECK(s8, 0x1000)
        li a4, 0x4000000000
        S_TO(2f)
        ld a0, 0(a4)
        j ufail
2:      CHECK(s6, 13)
        CHECK(s8, 0x4000000000)
        TEST(15) # U pages and SUM
        li a4, 0x3000
        S_TO(2f)
        ld a0, 0(a4)
        j ufail
2:      CHECK(s6, 13)
        li a0, MSTATUS_SUM
        csrs sstatus, a0
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        S_TO(2f) # but never to execute
        jr a4
2:      CHECK(s6, 12)
        li a0, MSTATUS_SUM
        csrc sstatus, a0
        S_TO(2f)
        sd a0, 0(a4)
        j ufail
2:      CHECK(s6, 15)
        TEST(16) # execute-only and MXR
        li a4, 0x4000
        S_TO(2f)
        ld a0, 0(a4)
        j ufail
2:      CHECK(s6, 13)
        li a0, MSTATUS_MXR
        csrs sstatus, a0
        ld a0, 0(a4)
        CHECK(a0, 0x2222)
        li a0, MSTATUS_MXR
        csrc sstatus, a0
        S_TO(2f)
        ld a0, 0(a4)
        j ufail
2:      CHECK(s6, 13)
        TEST(17) # accessed and dirty bits are set by hardware
        la a5, leaf
        li a4, 0x5000
        ld a0, 0(a4)
        ld a1, 40(a5)
        CHECK_BITS(a1, A | D, A)
        sd a0, 0(a4)
        ld a1, 40(a5)
        CHECK_BITS(a1, A | D, A | D)
        TEST(18) # write without read is reserved
        li a4, 0x6000
        S_TO(2f)
        ld a0, 0(a4)
        j ufail
2:      CHECK(s6, 13)
        TEST(19) # superpages: 2 MiB, and one that is not aligned
        li a4, 0x400000
        la a0, cell
        li a1, 0x1fffff
        and a0, a0, a1
        add a4, a4, a0
        ld a0, 0(a4)
        CHECK(a0, 0x123456)
        li a4, 0x600000
        S_TO(2f)
        ld a0, 0(a4)
        j ufail
2:      CHECK(s6, 13)
        TEST(20) # a mapping changes: seen after sfence.vma of the page
        li a4, 0x1000
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        MAP(leaf, 1, page_b, V | R | W | A | D)
        sfence.vma a4, zero
        ld a0, 0(a4)
        CHECK(a0, 0x2222)
        MAP(leaf, 1, page_a, V | R | W | A | D)
        sfence.vma
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        TEST(21) # two address spaces by ASID; each sees its own
        csrr a1, satp
        li a0, 1
        slli a0, a0, 44
        add a5, a1, a0
        la a0, root2
        srli a0, a0, 12
        li a2, 0x80001
        slli a2, a2, 44
        or a5, a0, a2
        MAP(root2, 2, ram, V | R | W | X | A | D)
        MAP(root2, 0, mid2, V)
        MAP(mid2, 0, leaf2, V)
        MAP(leaf2, 256, exit, V | R | W | A | D)
        MAP(leaf2, 1, page_b, V | R | W | A | D)
        li a4, 0x1000
        li a6, 3
1:      csrw satp, a5
        ld a0, 0(a4)
        CHECK(a0, 0x2222)
        csrw satp, a1
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        addi a6, a6, -1
        bnez a6, 1b
        MAP(leaf2, 1, page_a, V | R | W | A | D)
        li a0, 1
        sfence.vma a4, a0
        csrw satp, a5
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        csrw satp, a1
        sfence.vma
        TEST(22) # code through another mapping, remapped under it; in U-mode
        la a0, page_a
        lw a2, code_1
        sw a2, 0x100(a0)
        la a0, page_b
        lw a2, code_2
        sw a2, 0x100(a0)
        lw a2, code_ecall
        la a0, page_a
        sw a2, 0x104(a0)
        la a0, page_b
        sw a2, 0x104(a0)
        fence.i
        li a7, 0
        li a6, 4
1:      andi a0, a6, 1
        bnez a0, 3f
        MAP(leaf, 8, page_a, V | X | PU | A)
        j 4f
3:      MAP(leaf, 8, page_b, V | X | PU | A)
4:      li a4, 0x8000
        sfence.vma a4, zero
        li a0, 0x8100
        csrw sepc, a0
        li a0, MSTATUS_SPP
        csrc sstatus, a0
        S_TO(2f)
        sret
2:      CHECK(s6, 8)
        add a7, a7, a5
        addi a6, a6, -1
        bnez a6, 1b
        CHECK(a7, 6)
        TEST(23) # an instruction across two pages, the second of which is missing
        la a0, page_a + 0xffe
        li a2, 0x0793 # the first half of li a5, n
        sh a2, 0(a0)
        fence.i
        MAP(leaf, 8, page_a, V | X | PU | A)
        la a5, leaf
        sd zero, 72(a5)
        sfence.vma
        li a0, 0x8ffe
        csrw sepc, a0
        S_TO(2f)
        sret
2:      CHECK(s6, 12)
        CHECK(s7, 0x8ffe)
        CHECK(s8, 0x9000)
        TEST(26) # satp becomes bare under code in a global page: what follows is fetched untranslated, and is not there
        la a0, page_a
        lw a2, code_satp
        sw a2, 0x200(a0)
        lw a2, code_ecall
        sw a2, 0x204(a0)
        fence.i
        MAP(leaf, 32, page_a, V | R | X | A | 32)
        sfence.vma
        csrr a6, satp
        li a4, 0x20200
        li a5, 0x20204
        li a7, 3
1:      S_TO(2f) # run what follows alone first, so that it is known: ecall from S-mode is not delegated
        M_TO(3f)
        jr a5
3:      CHECK(s2, 9)
        GO(S, 4f)
4:      jr a4
2:      CHECK(s6, 1)
        CHECK(s7, 0x20204)
        CHECK(s8, 0x20204)
        csrw satp, a6
        sfence.vma
        addi a7, a7, -1
        bnez a7, 1b
        TEST(24) # MPRV with paging from M-mode
        TO_M(1f)
1:      li a4, 0x1000
        li a0, MSTATUS_MPP
        csrc mstatus, a0
        li a0, 0x800
        csrs mstatus, a0
        li a0, MSTATUS_MPRV
        csrs mstatus, a0
        ld a1, 0(a4)
        csrc mstatus, a0
        CHECK(a1, 0x1111)
        TEST(25) # Sv48 and Sv57 put a level, and two, on top
        MAP(root48, 0, root, V)
        MAP(root57, 0, root48, V)
        la a0, root48
        srli a0, a0, 12
        li a1, 9
        slli a1, a1, 60
        or a0, a0, a1
        csrw satp, a0
        sfence.vma
        M_TO(3f)
        GO(S, 2f)
2:      li a4, 0x1000
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        ecall
3:      la a0, root57
        srli a0, a0, 12
        li a1, 10
        slli a1, a1, 60
        or a0, a0, a1
        csrw satp, a0
        sfence.vma
        M_TO(3f)
        GO(S, 2f)
2:      li a4, 0x1000
        ld a0, 0(a4)
        CHECK(a0, 0x1111)
        ecall
3:      csrr a1, satp
        li a0, 11
        slli a0, a0, 60
        csrw satp, a0
        csrr a0, satp
        beq a0, a1, 1f
        j fail
1:      csrw satp, zero

        TEST(30) # supervisor software interrupt, delegated
        li a0, 0x222
        csrw mideleg, a0
        csrw mie, a0
        GO(S, 1f)
1:      csrr a0, sie
        CHECK(a0, 0x222)
        S_TO(2f)
        csrsi sip, 2
        csrsi sstatus, MSTATUS_SIE
1:      j 1b
2:      CHECK(s6, 0x8000000000000001)
        CHECK_BITS(s9, MSTATUS_SPP | MSTATUS_SPIE | MSTATUS_SIE, MSTATUS_SPP | MSTATUS_SPIE)
        csrci sip, 2
        csrr a0, sip
        CHECK(a0, 0)
        TEST(32) # Sstc: off, stimecmp is not there
        S_TO(2f)
        csrr a0, stimecmp
        j ufail
2:      CHECK(s6, 2)
        TO_M(1f)
1:      li a0, -1
        csrw stimecmp, a0
        li a0, 1
        slli a0, a0, 63
        csrw menvcfg, a0
        csrwi mcounteren, 2
        GO(S, 1f)
1:      csrr a0, sip
        CHECK(a0, 0)
        TEST(33) # the comparator wakes WFI and interrupts
        csrci sstatus, MSTATUS_SIE
        csrr a2, time
        li a1, 20000
        add a1, a2, a1
        csrw stimecmp, a1
        S_TO(2f)
1:      wfi
        csrr a0, sip
        CHECK(a0, 0x20)
        csrr a0, time
        bgeu a0, a1, 1f
        j ufail
1:      csrsi sstatus, MSTATUS_SIE
        j ufail
2:      CHECK(s6, 0x8000000000000005)
        li a0, -1
        csrw stimecmp, a0
        csrr a0, sip
        CHECK(a0, 0)
        TEST(34) # and interrupts a loop that does nothing
        csrr a2, time
        li a1, 20000
        add a1, a2, a1
        csrw stimecmp, a1
        S_TO(2f)
        csrsi sstatus, MSTATUS_SIE
1:      j 1b
2:      CHECK(s6, 0x8000000000000005)
        TEST(35) # what comes while it is masked comes when it no longer is, and once it is seen not a moment later
        csrci sstatus, MSTATUS_SIE
        li a3, 50
1:      csrr a2, time
        addi a1, a2, 30
        csrw stimecmp, a1
2:      csrr a0, time
        bltu a0, a1, 2b
        S_TO(2f)
        csrsi sstatus, MSTATUS_SIE
        j ufail
2:      CHECK(s6, 0x8000000000000005)
        csrr a2, time
        addi a1, a2, 30
        csrw stimecmp, a1
2:      csrr a0, sip
        beqz a0, 2b
        S_TO(2f)
        csrsi sstatus, MSTATUS_SIE
        j ufail
2:      CHECK(s6, 0x8000000000000005)
        addi a3, a3, -1
        bnez a3, 1b
        TEST(36) # a loop that does nothing while it is masked
        csrr a2, time
        li a1, 20000
        add a1, a2, a1
        csrw stimecmp, a1
        li a0, 20000000
1:      addi a0, a0, -1
        bnez a0, 1b
        S_TO(2f)
        csrsi sstatus, MSTATUS_SIE
1:      j 1b
2:      CHECK(s6, 0x8000000000000005)
        TEST(37) # and one that is put off before it comes
        csrr a2, time
        addi a1, a2, 1000
        csrw stimecmp, a1
        li a0, -1
        csrw stimecmp, a0
        csrsi sstatus, MSTATUS_SIE
        li a0, 2000000
1:      addi a0, a0, -1
        bnez a0, 1b
        j pass

        .balign 4
        .option push
        .option norvc
code_1: li a5, 1
        .option pop
        .balign 4
code_2: .option push
        .option norvc
        li a5, 2
        .option pop
        .balign 4
code_satp:
        csrw satp, zero
        .balign 4
code_ecall:
        ecall

        .data
        .balign 8
cell:   .dword 0x123456
        .balign 4096
root:   .skip 4096
mid:    .skip 4096
leaf:   .skip 4096
root2:  .skip 4096
mid2:   .skip 4096
leaf2:  .skip 4096
root48: .skip 4096
root57: .skip 4096
page_a: .skip 4096
page_b: .skip 4096
        .globl ram
        .set ram, 0x80000000
        .set exit, EXIT
