# A guest of one page for recorded migrations: firmware of `virt` that counts on the serial port.
# make-stream assembles it for 0x80000000.
    .globl _start
_start:
    csrr    t0, mhartid
    bnez    t0, park
    li      s0, 0x10000000          # the serial port
    la      s1, count
again:
    li      t0, 20000
1:  addi    t0, t0, -1
    bnez    t0, 1b
    ld      s2, 0(s1)
    addi    s2, s2, 1
    sd      s2, 0(s1)               # the count is in RAM, not in a register
    li      t1, 'T'
    jal     put
    li      s3, 28
2:  srl     t1, s2, s3
    andi    t1, t1, 15
    addi    t1, t1, '0'
    li      t2, '9'
    ble     t1, t2, 3f
    addi    t1, t1, 'a' - '9' - 1
3:  jal     put
    addi    s3, s3, -4
    bgez    s3, 2b
    li      t1, '\n'
    jal     put
    j       again
put:
    lbu     t3, 5(s0)               # line status: room for a byte?
    andi    t3, t3, 0x20
    beqz    t3, put
    sb      t1, 0(s0)
    ret
park:
    wfi
    j       park
    .balign 8
count:
    .dword  0
