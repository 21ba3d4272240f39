-- Take away what lies under an id and is no parked item, or an id in the index under which nothing lies.
--
-- KEYS: as for room.lua, then the lock of the command, if it has one; ARGV: id, SHA-1 of what lies there, or "" for
--       nothing, then the lock's token
-- Returns 1; 0 if something else lies there by now; -1 if the lock is not the command's any more.
if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[3] then return -1 end
local held = redis.call('HGET', KEYS[1], ARGV[1])
if (held and redis.sha1hex(held) or '') ~= ARGV[2] then return 0 end
take_away(ARGV[1])
return 1
