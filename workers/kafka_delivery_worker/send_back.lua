-- Put messages into their queues and take the item of them away: all or nothing, and only while the lock is the
-- command's.
--
-- KEYS: as for room.lua, lock of the command, then the list of each message; ARGV: id, time (ms) at which it was parked,
--       the lock's token, then the messages
-- Returns 1; 0 if the item is not there, or was parked again since that time; -1 if the lock is not the command's any
-- more.
if redis.call('GET', KEYS[4]) ~= ARGV[3] then return -1 end
if not is_there(ARGV[1], ARGV[2]) then return 0 end
-- Before anything is taken away: a full Redis refuses a script's first write, and a key that is no list is an error.
for i = 5, #KEYS do redis.call('LPUSH', KEYS[i], ARGV[i - 1]) end
take_away(ARGV[1])
return 1
