//! A bus that is made up here: it says what a real one never would. A real one with real helpers is in the end-to-end tests.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use serde::Serialize;
use zbus::wire::serialized::Context;
use zbus::wire::{Endian, to_bytes};
use zbus::{Signature, Type, Variant};

use super::*;
use holdfast_objects::vmstate::{BusAddress, BusSocket};

const OK: &str = "OK 0123456789abcdef0123456789abcdef\r\n";
/// A helper's name on the bus.
const A: &str = ":1.7";
const B: &str = ":1.8";
const SHORT: Duration = Duration::from_millis(300);

/// One message of `kind` that answers the call number `to`; an error has this name.
fn message<T: Serialize + Type>(
    endian: Endian,
    (kind, name): (u8, &str),
    to: u32,
    sender: &str,
    body: &T,
) -> Vec<u8> {
    let context = Context::new(endian, 0);
    let body_bytes = to_bytes(context, body).expect("a body");
    let mut fields = vec![(5u8, Variant::from(to)), (7, Variant::from(sender))];
    if kind == message::ERROR {
        fields.push((4, Variant::from(name)));
    }
    if *T::SIGNATURE != Signature::Unit {
        fields.push((8, Variant::from(T::SIGNATURE.clone())));
    }
    let first = if endian == Endian::Big { b'B' } else { b'l' };
    let header = (first, kind, 0u8, 1u8, body_bytes.len() as u32, 9u32, fields);
    let mut bytes = to_bytes(context, &header).expect("a header").to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend_from_slice(&body_bytes);
    bytes
}

const RETURN: (u8, &str) = (message::METHOD_RETURN, "");

fn error(to: u32, sender: &str, name: &str, text: &str) -> Vec<u8> {
    message(Endian::Little, (message::ERROR, name), to, sender, &text)
}

fn answer<T: Serialize + Type>(to: u32, sender: &str, body: &T) -> Vec<u8> {
    message(Endian::Little, RETURN, to, sender, body)
}

fn properties(id: &str) -> HashMap<&'static str, Variant<'_>> {
    HashMap::from([("Other", Variant::from(7u32)), ("Id", Variant::from(id))])
}

/// What a bus says: a line when somebody wants in, then an answer to each call.
struct Script {
    welcome: Vec<u8>,
    answers: Vec<Vec<u8>>,
}

impl Script {
    /// A bus with owners of the name that have these Ids, whose calls 1 to 2 + n that takes; `more` follows.
    fn with(owners: &[(&str, &str)], more: Vec<Vec<u8>>) -> Self {
        let names: Vec<&str> = owners.iter().map(|(name, _)| *name).collect();
        let mut answers = vec![answer(1, bus::BUS, &":1.9"), answer(2, bus::BUS, &names)];
        answers.extend((3..).zip(owners).map(|(n, (name, id))| answer(n, name, &properties(id))));
        answers.extend(more);
        Self { welcome: OK.into(), answers }
    }
}

/// A bus that follows a script and then says nothing more; the thread returns what it was told after the greeting.
struct Fake {
    object: DbusVmState,
    told: JoinHandle<Vec<Vec<u8>>>,
    _dir: tempfile::TempDir,
}

fn line(stream: &mut UnixStream) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        line.extend(byte);
    }
    String::from_utf8(line).ok()
}

fn serve(mut stream: UnixStream, script: Script) -> Option<Vec<Vec<u8>>> {
    let mut told = Vec::new();
    assert_eq!(line(&mut stream)?, "\0AUTH EXTERNAL\r\n");
    stream.write_all(b"DATA\r\n").ok()?;
    assert_eq!(line(&mut stream)?, "DATA\r\n");
    stream.write_all(&script.welcome).ok()?;
    if line(&mut stream)? != "BEGIN\r\n" {
        return None;
    }
    let mut answers = script.answers.into_iter();
    let mut prologue = [0; message::PROLOGUE];
    while stream.read_exact(&mut prologue).is_ok() {
        let rest = message::rest(prologue, 2 << 20).expect("our own message");
        let mut bytes = prologue.to_vec();
        bytes.resize(message::PROLOGUE + rest, 0);
        stream.read_exact(bytes.get_mut(message::PROLOGUE..)?).ok()?;
        told.push(bytes);
        match answers.next() {
            // An empty one is the end.
            Some(answer) if answer.is_empty() => break,
            Some(answer) => stream.write_all(&answer).ok()?,
            None => {}
        }
    }
    Some(told)
}

impl Fake {
    fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("bus");
        let listener = UnixListener::bind(&path).expect("a socket");
        let told = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("somebody");
            serve(stream, script).unwrap_or_default()
        });
        let addr = format!("unix:path={}", path.display());
        let places = vec![BusAddress { socket: BusSocket::Path(path), guid: None }];
        let object = DbusVmState { id: "v".into(), addr, places, ids: None };
        Self { object, told, _dir: dir }
    }

    fn find(&self) -> Result<Helpers, HelperError> {
        Helpers::find_within(&self.object, SHORT)
    }

    fn fails(self) -> String {
        describe(&self.find().expect_err("it makes no sense"))
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |e| (*e).source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn states_go_there_and_back() {
    for endian in [Endian::Little, Endian::Big] {
        let all = |to, sender, body: &[u8]| message(endian, RETURN, to, sender, &body);
        let big = vec![0xa5; MAX_STATE];
        let none = message(endian, RETURN, 7, A, &());
        let fake = Fake::new(Script::with(
            &[(A, "one"), (B, "two")],
            vec![all(5, A, b"state of one"), all(6, B, &big), none],
        ));
        let mut helpers = fake.find().expect("they are there");
        assert_eq!(helpers.ids().collect::<Vec<_>>(), ["one", "two"]);
        helpers.need(["two"]).expect("there");
        let missing = helpers.need(["two", "six", "ten"]);
        let missing = missing.expect_err("two are not there").to_string();
        assert!(
            missing.starts_with("helpers are missing on the bus `unix:path=")
                && missing.ends_with(": `six`, `ten`")
        );
        let states = helpers.save().expect("saved");
        assert_eq!(states[0], ("one".to_owned(), b"state of one".to_vec()));
        assert_eq!(states[1], ("two".to_owned(), big));
        helpers.load("one", b"new state").expect("loaded");
        assert!(matches!(helpers.load("six", b""), Err(HelperError::Missing { .. })));
        assert!(matches!(helpers.load("one", &vec![0; MAX_STATE + 1]), Err(HelperError::Large { .. })));
        drop(helpers);
        let told = fake.told.join().expect("the bus");
        let has = |n: usize, text: &str| told[n].windows(text.len()).any(|w| w == text.as_bytes());
        let asked = ["Hello", "ListQueuedOwners", "GetAll", "GetAll", "Save", "Save", "Load"];
        assert_eq!(told.len(), asked.len());
        assert!(asked.iter().enumerate().all(|(n, member)| has(n, member)), "{told:?}");
        assert!(has(1, NAME) && has(2, A) && has(2, NAME) && has(3, B) && has(4, PATH));
        assert!(told[6].ends_with(b"\x09\0\0\0new state"));
    }
}

#[test]
fn only_those_that_are_listed_move_and_all_of_them_are_needed() {
    let owners = [(A, "one"), (B, "two")];
    let listed = |ids: &[&str]| {
        let mut fake = Fake::new(Script::with(&owners, Vec::new()));
        fake.object.ids = Some(ids.iter().map(|id| (*id).to_owned()).collect());
        fake.find().map(|helpers| helpers.ids().cloned().collect::<Vec<_>>())
    };
    assert_eq!(listed(&["two"]).expect("there"), ["two"]);
    let missing = listed(&["two", "three", "four"]).expect_err("two are not there").to_string();
    assert!(missing.ends_with("`four`, `three`"), "{missing}");
    // Nobody has queued for the name.
    let nobody = || {
        let mut script = Script::with(&[], Vec::new());
        script.answers[1] = error(2, bus::BUS, NO_OWNER, "no such name");
        Fake::new(script)
    };
    assert_eq!(nobody().find().expect("that is no error").ids().count(), 0);
    let mut fake = nobody();
    fake.object.ids = Some(["one".to_owned()].into());
    assert!(fake.fails().ends_with("`one`"));
}

#[test]
fn state_that_comes_has_to_be_somebodys() {
    let object = |ids: Option<&[&str]>| DbusVmState {
        ids: ids.map(|ids| ids.iter().map(|id| (*id).to_owned()).collect()),
        ..Fake::new(Script::with(&[(A, "one")], Vec::new())).object
    };
    let fails = |object: Option<&DbusVmState>, ids: &[&str]| {
        describe(&Helpers::find_all(object, ids.iter().copied()).expect_err("it makes no sense"))
    };
    let none = fails(None, &["two", "one"]);
    assert_eq!(
        none,
        "the state of helpers comes along (`one`, `two`), and there is no dbus-vmstate object here"
    );
    assert!(fails(None, &["one", "one"]).ends_with("one Id twice"));
    assert!(fails(None, &[""]).ends_with("1 to 255 bytes without NUL"));
    let unlisted = fails(Some(&object(Some(&["one"]))), &["one", "two"]);
    assert_eq!(unlisted, "the helper `two` is not in the id-list of the dbus-vmstate object `v`");
    let fake = Fake::new(Script::with(&[(A, "one")], Vec::new()));
    assert!(fails(Some(&fake.object), &["one", "two"]).ends_with(": `two`"));
    let fake = Fake::new(Script::with(&[(A, "one"), (B, "more")], Vec::new()));
    Helpers::find_all(Some(&fake.object), ["one"].into_iter()).expect("it is there");
}

#[test]
fn who_is_no_helper_is_named() {
    let long = "x".repeat(256);
    let broken = |to, sender| error(to, sender, "org.example.Broken", "it is broken");
    let mut nameless = Script::with(&[], Vec::new());
    nameless.answers[1] = answer(2, bus::BUS, &vec![A]);
    nameless.answers.push(answer(3, A, &HashMap::from([("Other", Variant::from(7u32))])));
    let mut number = Script::with(&[(A, "")], Vec::new());
    number.answers[2] = answer(3, A, &HashMap::from([("Id", Variant::from(7u32))]));
    let mut refuses = Script::with(&[(A, "")], Vec::new());
    refuses.answers[2] = broken(3, A);
    let mut many = Script::with(&[], Vec::new());
    many.answers[1] = answer(2, bus::BUS, &vec![A; MAX_HELPERS + 1]);
    let mut denied = Script::with(&[], Vec::new());
    denied.answers[1] = broken(2, bus::BUS);
    for (script, says) in [
        (Script::with(&[(A, "one"), (B, "one")], Vec::new()), "two helpers on the bus"),
        (Script::with(&[(A, "")], Vec::new()), "`:1.7` on the bus"),
        (Script::with(&[(A, &long)], Vec::new()), "not of 1 to 255 bytes"),
        (nameless, "`:1.7`, an owner of org.qemu.VMState1 on the bus"),
        (number, "the property Id is no text"),
        (refuses, "does not tell its Id: it is broken (org.example.Broken)"),
        (many, "257 helpers on the bus"),
        (denied, "of the dbus-vmstate object `v` cannot be used: it is broken"),
    ] {
        let said = Fake::new(script).fails();
        assert!(said.contains(says), "{says}: {said}");
    }
    let exact = "x".repeat(255);
    let found = Fake::new(Script::with(&[(A, &exact)], Vec::new())).find().expect("255 bytes are fine");
    assert_eq!(found.ids().collect::<Vec<_>>(), [&exact]);
}

#[test]
fn a_bus_that_is_none_is_refused() {
    let welcome = |text: &str| Script { welcome: text.into(), answers: Vec::new() };
    for (script, says) in [
        (welcome("REJECTED EXTERNAL\r\n"), "it does not let this user in"),
        (welcome("HTTP/1.1 400 Bad Request\r\n"), "when asked to be let in"),
        (welcome("OK"), "there was no answer within 0 seconds"),
        (welcome(&"x".repeat(2000)), "it is no D-Bus bus"),
        (welcome(OK), "there was no answer"),
    ] {
        let said = Fake::new(script).fails();
        assert!(said.contains("dbus-vmstate object `v`") && said.contains(says), "{says}: {said}");
    }
    let mut other = Fake::new(Script::with(&[], Vec::new()));
    other.object.places[0].guid = Some("f".repeat(32));
    assert!(other.fails().contains("another than the address names"));
    let mut nobody = Fake::new(Script::with(&[], Vec::new()));
    let good = nobody.object.places[0].clone();
    nobody.object.places =
        vec![BusAddress { socket: BusSocket::Abstract(b"nobody is here".to_vec()), guid: None }];
    let said = describe(&nobody.find().expect_err("nobody"));
    assert!(said.contains("nobody can be reached there: Connection refused"), "{said}");
    nobody.object.places.push(good);
    nobody.find().expect("the second place is good");
}

#[test]
fn a_helper_that_fails_is_named() {
    let one = [(A, "one")];
    let saves = |answers: Vec<Vec<u8>>| {
        let fake = Fake::new(Script::with(&one, answers));
        let mut helpers = fake.find().expect("there");
        helpers.save().map_err(|e| describe(&e))
    };
    let error = |to, sender| error(to, sender, "org.example.Broken", "it is gone");
    let long = vec![0u8; MAX_STATE + 1];
    for (answers, says) in [
        (vec![error(4, A)], "cannot save its state: it is gone (org.example.Broken)"),
        (vec![error(4, bus::BUS)], "cannot save its state: it is gone (org.example.Broken)"),
        (vec![answer(4, A, &"text")], "an answer of type `s` instead of `ay`"),
        (vec![answer(4, A, &long)], "has more than 1048576 bytes"),
        (vec![Vec::new()], "the connection to the bus broke"),
        (vec![], "there was no answer within 0 seconds"),
        // What is no answer, or another's, is no state.
        (vec![answer(3, A, &vec![1u8]), answer(4, B, &vec![1u8])], "there was no answer"),
        (vec![answer(4, bus::BUS, &vec![1u8])], "there was no answer"),
    ] {
        let said = saves(answers).expect_err(says);
        assert!(said.contains("the helper `one`") || said.contains("of the helper `one`"), "{said}");
        assert!(said.contains(says), "{says}: {said}");
    }
    // What comes in between is passed over.
    let mut between = answer(3, A, &vec![9u8]);
    between.extend(answer(4, B, &vec![9u8]));
    between.extend(answer(4, A, &vec![1u8, 2]));
    assert_eq!(saves(vec![between]), Ok(vec![("one".to_owned(), vec![1, 2])]));
    let fake = Fake::new(Script::with(&one, vec![error(4, A)]));
    let said = describe(&fake.find().expect("there").load("one", b"x").expect_err("it refuses"));
    assert_eq!(said, "the helper `one` cannot load its state: it is gone (org.example.Broken)");
}

#[test]
fn altered_messages_are_errors_at_most() {
    let good = [
        answer(4, A, &vec![1u8, 2, 3]),
        message(Endian::Big, (message::ERROR, "org.example.Broken"), 4, A, &"text"),
        answer(3, A, &properties("one")),
    ];
    let mut read = 0;
    for bytes in good {
        message::Message::parse(bytes.clone()).expect("as it was made");
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut altered = bytes.clone();
                altered[at] ^= flip;
                if let Ok(message) = message::Message::parse(altered) {
                    let _ = message.body::<Vec<u8>>();
                    let _ = message.body::<HashMap<String, OwnedVariant>>();
                    let _ = message.complaint();
                    read += 1;
                }
            }
            assert!(message::Message::parse(bytes[..at].to_vec()).is_err(), "cut at {at}");
        }
    }
    assert!(read > 0, "some alterations leave it a message");
}
