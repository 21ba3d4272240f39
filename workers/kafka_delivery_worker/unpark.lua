-- Take one item away.
--
-- KEYS: as for room.lua, then the lock of the command, if it has one; ARGV: id, time (ms) at which it was parked, or "",
--       then the lock's token
-- Returns 1; 0 if it is not there, or was parked again since that time; -1 if the lock is not the command's any more.
if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[3] then return -1 end
if not is_there(ARGV[1], ARGV[2]) then return 0 end
take_away(ARGV[1])
return 1
