#!/usr/bin/python3
"""A helper with state that moves along with a VM: org.qemu.VMState1 on a D-Bus bus, by libdbus (Debian: python3-dbus, python3-gi).

Usage: vmstate_helper.py ADDRESS ID FILE [HOW]   (`queued` is printed when it has queued for the name)

Its state is what is in FILE, and is put there when it is loaded. HOW: `refuses` raises an error instead of loading, `silent` never
answers when asked to save, `dies` then, `large` gives more state than may be.
Written from QEMU's documentation, docs/interop/dbus-vmstate.rst."""

import os
import sys

import dbus
import dbus.bus
import dbus.service
from dbus.mainloop.glib import DBusGMainLoop
from gi.repository import GLib

NAME, PATH = "org.qemu.VMState1", "/org/qemu/VMState1"
LIMIT = 1 << 20


class Broken(dbus.DBusException):
    _dbus_error_name = "org.example.Broken"


class Helper(dbus.service.Object):
    def __init__(self, bus, own_id, path, how):
        super().__init__(bus, PATH)
        self.id, self.path, self.how = own_id, path, how

    @dbus.service.method(dbus.PROPERTIES_IFACE, in_signature="ss", out_signature="v")
    def Get(self, interface, name):
        return self.GetAll(interface)[name]

    @dbus.service.method(dbus.PROPERTIES_IFACE, in_signature="s", out_signature="a{sv}")
    def GetAll(self, interface):
        return {"Id": self.id} if interface == NAME else {}

    @dbus.service.method(NAME, in_signature="", out_signature="ay", async_callbacks=("answer", "fail"))
    def Save(self, answer, fail):
        if self.how == "silent":
            return
        if self.how == "dies":
            os._exit(1)
        with open(self.path, "rb") as file:
            state = file.read()
        answer(dbus.ByteArray(bytes(LIMIT + 1) if self.how == "large" else state))

    @dbus.service.method(NAME, in_signature="ay", out_signature="", byte_arrays=True)
    def Load(self, state):
        if self.how == "refuses":
            raise Broken("this is not what I was")
        with open(self.path + ".new", "wb") as file:
            file.write(state)
        os.rename(self.path + ".new", self.path)


def main():
    address, own_id, path, how = (sys.argv[1:] + [""])[:4]
    DBusGMainLoop(set_as_default=True)
    bus = dbus.bus.BusConnection(address)
    helper = Helper(bus, own_id, path, how)
    bus.request_name(NAME)
    print("queued", flush=True)
    GLib.MainLoop().run()
    del helper


main()
